"""The skeleton that a new pass is copied from works as it stands."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import skive.passes  # noqa: F401 - registers the passes
from skive.pipeline import PASSES, PassManager
from skive.text import parse_graph, print_graph

SKELETON = Path(__file__).resolve().parents[2] / "passes" / "SKELETON.py"

BEFORE = """graph @g(%x: f32[2]) {
  %a = neg %x : f32[2]
  %b = neg %a : f32[2]
  return %b as "y"
}
"""


def test_skeleton_is_a_pass() -> None:
    spec = importlib.util.spec_from_file_location("skeleton", SKELETON)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["skeleton"] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
        graph = parse_graph(BEFORE)
        after, _ = PassManager().run(graph, "verb-phrase{limit=8},eliminate-identity", check="always")
        assert print_graph(after) == 'graph @g(%x: f32[2]) {\n  return %x as "y"\n}\n'
    finally:
        PASSES.pop("verb-phrase", None)
        del sys.modules["skeleton"]
