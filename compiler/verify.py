"""The verifier: what every graph must satisfy between two passes.

Types are inferred again from the op table, so a pass cannot leave a wrong shape behind.
"""

from __future__ import annotations

from collections.abc import Callable

from skive import ops
from skive.errors import InvalidModelError, ShapeError
from skive.ir import Graph, Node
from skive.types import DType

# Phase rules: what must hold of every node once a phase of the pipeline is complete. A rule gives
# the complaint, or None.


def _no_fused(node: Node) -> str | None:
    if node.op == "map" or node.attrs.get("epilogue"):
        return "holds a fused expression, which only fuse-elementwise may make"
    return None


PHASES: dict[str, tuple[Callable[[Node], str | None], ...]] = {
    "imported": (_no_fused,),
    "fused": (),
}


def verify(graph: Graph, *, after: str = "import", phase: str | None = None) -> None:
    """Nothing, or InvalidModelError naming the node, the complaint and the pass `after` which it arose.

    Checks: no cycle, outputs named once each, every reachable `input` is a parameter, attributes
    complete and known, types as inferred, constants that match their type, and the rules of `phase`.
    """

    def fail(node: Node | None, complaint: str) -> None:
        place = node.label() if node is not None else graph.name
        raise InvalidModelError(f"{place}: {complaint} (after {after})")

    if len(graph.outputs) != len(graph.output_names):
        fail(None, f"{len(graph.outputs)} outputs have {len(graph.output_names)} names")
    if not graph.outputs:
        fail(None, "the graph has no outputs")
    if len(set(graph.output_names)) != len(graph.output_names):
        fail(None, "two outputs have the same name")
    parameters = set(graph.inputs)
    if len(parameters) != len(graph.inputs):
        fail(None, "an input is listed twice")
    if len({i.name for i in graph.inputs}) != len(graph.inputs):
        fail(None, "two inputs have the same name")
    for i in graph.inputs:
        if i.op != "input":
            fail(i, f"the graph input is a {i.op}")
    rules = PHASES[phase] if phase else ()
    for node in graph.nodes:  # raises InvalidModelError on a cycle
        if node.op == "input" and node not in parameters:
            fail(node, "reads an input that is not a parameter of the graph")
        try:
            complete = ops.complete_attrs(node.op, dict(node.attrs))
            inferred = ops.infer(node.op, [i.type for i in node.inputs], node.attrs)
        except (InvalidModelError, ShapeError) as e:
            fail(node, str(e))
        if set(complete) != set(node.attrs):
            fail(node, f"lacks the attribute {sorted(set(complete) - set(node.attrs))[0]!r}")
        if inferred.shape != node.shape or inferred.dtype is not node.dtype:
            fail(node, f"{node.op} has type {node.type} where the op table gives {inferred}")
        if node.is_const and (node.value.shape != node.shape or DType.of(node.value.dtype) is not node.dtype):
            fail(node, f"constant of {node.value.dtype}{list(node.value.shape)} is typed {node.type}")
        for broken in filter(None, (r(node) for r in rules)):
            fail(node, broken)
    for old, new in graph.states:
        if old not in parameters or old.type != new.type:
            fail(new, "a state must pair an input with a value of its type")
