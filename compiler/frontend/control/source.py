"""The source of functions: their syntax trees with the line numbers of the user's file."""

from __future__ import annotations

import ast
import functools
import linecache
import os
import sysconfig
from pathlib import Path
from types import CodeType, FrameType, TracebackType
from typing import TypeAlias

import torch

from skive.frontend.control.values import Refusal

Definition: TypeAlias = "ast.FunctionDef | ast.Lambda"

HERE = os.path.dirname(__file__) + os.sep
TORCH = os.path.dirname(torch.__file__) + os.sep
STANDARD = sysconfig.get_paths()["stdlib"] + os.sep
CONTAINERS = os.path.join("torch", "nn", "modules", "container.py")


@functools.cache
def _definitions(filename: str) -> dict[tuple[str, int], list[Definition]]:
    """Every function of a file by name and first line."""
    text = "".join(linecache.getlines(filename))
    if not text:
        raise Refusal(f"the source of {Path(filename).name} is not at hand", "put forward into a file")
    found: dict[tuple[str, int], list[Definition]] = {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            line = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            found.setdefault((node.name, line), []).append(node)
        elif isinstance(node, ast.Lambda):
            found.setdefault(("<lambda>", node.lineno), []).append(node)
    return found


def definition(code: CodeType) -> Definition:
    """The syntax tree that `code` was compiled from; Refusal where it is not to be found."""
    nodes = _definitions(code.co_filename).get((code.co_name, code.co_firstlineno), [])
    if len(nodes) != 1:
        what = "the source has changed" if not nodes else "several functions stand in one line"
        raise Refusal(f"{code.co_name}: {what}", "give it a line and a name of its own")
    if code.co_flags & 0x2A0:  # generators and coroutines
        raise Refusal(f"{code.co_name} is a generator that decides on tensors", "return a list")
    return nodes[0]


def line_of(filename: str, number: int) -> str:
    """`net.py:12: if y.max() > 0.5` for a message."""
    text = linecache.getline(filename, number).strip().rstrip(":")
    return f"{Path(filename).name}:{number}: {text}"


def may_interpret(frame: FrameType) -> bool:
    """Whether the code of this frame is a user's: of no library that Python or PyTorch brings, of containers though."""
    filename = frame.f_code.co_filename
    if filename.startswith(HERE) or filename.startswith("<"):
        return False
    if filename.startswith(TORCH):
        return filename.endswith(CONTAINERS)
    return not filename.startswith(STANDARD) or "site-packages" in filename


def codes_on(traceback: TracebackType | None) -> list[tuple[CodeType, int]]:
    """(code, line) of the user's functions on a traceback, outermost first."""
    found = []
    while traceback is not None:
        if may_interpret(traceback.tb_frame):
            found.append((traceback.tb_frame.f_code, traceback.tb_lineno))
        traceback = traceback.tb_next
    return found
