"""Names and comments of emitted C++ that come from a model."""

from __future__ import annotations

import re

_KEYWORDS = frozenset(
    """
    alignas alignof and asm auto bitand bitor bool break case catch char class compl const constexpr
    continue decltype default delete do double else enum explicit export extern false float for
    friend goto if inline int long mutable namespace new noexcept not nullptr operator or private
    protected public register return short signed sizeof static struct switch template this throw
    true try typedef typeid typename union unsigned using virtual void volatile while xor int8_t
    int16_t int32_t int64_t uint8_t uint16_t uint32_t uint64_t size_t main
    """.split()
)

# NAME.h would hide a header of the C library from a program that looks into the artefact's folder,
# libNAME one of the libraries that every program links; CMake keeps some targets to itself.
_TAKEN = frozenset(
    """
    assert complex ctype errno fenv float inttypes iso646 limits locale math setjmp signal stdalign
    stdarg stdatomic stdbool stddef stdint stdio stdlib stdnoreturn string strings tgmath threads
    time uchar wchar wctype pthread sched semaphore unistd fcntl dlfcn malloc memory features c m
    gcc gcc_s pthread dl rt stdc all ALL_BUILD clean edit_cache help install INSTALL package PACKAGE
    package_source preinstall rebuild_cache RUN_TESTS test ZERO_CHECK
    """.split()
)


def identifier(text: str, fallback: str = "model") -> str:
    """A C identifier made of `text`: other characters become `_`; never a name that means something else."""
    s = re.sub(r"[^A-Za-z0-9]+", "_", text).strip("_")[:60].rstrip("_") or fallback
    return f"m_{s}" if s[0].isdigit() or s in _KEYWORDS or s in _TAKEN else s


def comment(text: str) -> str:
    """`text` as it may stand in a `//` comment: printable ASCII, no backslash (line splice)."""
    return re.sub(r"[^ -\[\]-~]", "?", text)[:120].rstrip()
