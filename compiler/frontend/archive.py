"""What a `.pt2` archive may hold, so that reading it runs nothing that it brings."""

from __future__ import annotations

import contextlib
import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from skive.errors import InvalidModelError, first_line

# Operators that a file may call: those of ATen, torch's control flow and Python's arithmetic.
_TARGET = re.compile(
    r"torch\.ops\.skive\.exit_point\.default|torch\.ops\.(aten|prims|higher_order)(\.(_?[A-Za-z]\w*|__i?(and|or|xor|lshift|rshift)__)){1,2}"
    r"|_operator\.(add|sub|mul|truediv|floordiv|mod|neg|pos|pow|getitem|eq|ne|ge|gt|le|lt|and_|or_|not_)"
    r"|math\.(ceil|floor|trunc|sqrt)|torch\.sym_[a-z]+|#\w*")
# Size expressions: symbols, numbers, arithmetic, and the functions of sympy that export writes.
_EXPRESSION = re.compile(
    r"(Symbol\('[a-z]+\d+'(, (positive|integer)=True)*\)|[a-z]{1,3}\d+|Integer|Rational|Add|Mul|Pow|Max|Min|Mod"
    r"|PythonMod|FloorDiv|CeilDiv|ModularIndexing|IntTrueDiv|oo|int_oo|True|False|And|Or|Not|Eq|Ne|Ge|Le|Gt|Lt"
    r"|\d+|[-+*/%<>=&|~,() ])*")


def refuse_code(path: Path) -> None:
    """InvalidModelError unless reading the `.pt2` archive with torch runs nothing that the file brings.

    `torch.export.load` unpickles tensors and objects, evaluates size expressions as Python and calls
    whatever function of torch the graph names; a model from elsewhere may use each to run commands.
    """
    def refuse(why: str) -> InvalidModelError:
        return InvalidModelError(f"{path}: {why}; export the model again with torch.export.save")

    try:
        with zipfile.ZipFile(path) as archive:
            members = {n.partition("/")[2]: n for n in archive.namelist()}
            documents = {n: json.loads(archive.read(full)) for n, full in members.items() if n.endswith(".json")}
            samples = {n: archive.read(full) for n, full in members.items() if n.startswith("data/sample_inputs/")}
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError, RuntimeError, EOFError) as e:
        raise InvalidModelError(f"{path}: not a .pt2 archive, or a damaged one: {first_line(e)}") from None
    if not any(n.startswith("models/") for n in members):
        raise refuse("an archive without an exported program")
    for n in members:
        if n.startswith("data/aotinductor/") or n in ("version", "serialized_state_dict.pt"):
            raise refuse(f"the archive holds {n}, which is compiled code or an old format")
        if n.startswith(("data/weights/", "data/constants/")) and n.endswith((".pt", ".pkl")):
            raise refuse(f"{n} is a pickle")
    for n, document in documents.items():
        for key, value in _pairs(document):
            if key == "use_pickle" and value:
                raise refuse(f"{n} stores tensors as pickles")
            if key == "path_name" and str(value).startswith(("custom_obj_", "opaque_obj_")):
                raise refuse(f"{n} stores objects as pickles")
            if key == "target" and isinstance(value, str) and not _TARGET.fullmatch(value):
                raise refuse(f"{n} calls {value[:80]!r}")
            if key == "expr_str" and not _EXPRESSION.fullmatch(str(value)):
                raise refuse(f"{n} holds the expression {str(value)[:80]!r}")
            if key == "__enum__":
                raise refuse(f"{n} names a Python class")
    import torch

    for n, data in samples.items():
        try:
            torch.load(io.BytesIO(data), weights_only=True)
        except Exception:  # noqa: BLE001 - the restricted unpickler's refusals
            raise refuse(f"{n} holds more than tensors") from None


def _pairs(document: Any) -> Iterator[tuple[str, Any]]:
    """Every (key, value) of a JSON document, at any depth; JSON inside strings is opened too."""
    stack = [document]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            for key, value in item.items():
                yield key, value
                stack.append(value)
        elif isinstance(item, list):
            stack.extend(item)
        elif isinstance(item, str) and item.startswith(("[", "{")):
            with contextlib.suppress(ValueError):
                stack.append(json.loads(item))
