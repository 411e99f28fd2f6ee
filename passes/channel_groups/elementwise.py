"""Rules: inputs, constants, and operations that compute each element by itself."""

from __future__ import annotations

from skive.ir import Node
from skive.passes.channel_groups.labels import Analysis, Axes, broadcast, rule


@rule("input")
def _input(at: Analysis, node: Node) -> Axes:
    return tuple(at.joins.kept(d, f"an input of the network ({node.label()})") for d in node.shape)


@rule("const")
def _const(at: Analysis, node: Node) -> Axes:
    return tuple(at.joins.fresh(d) for d in node.shape)


@rule("kind elementwise")
def _elementwise(at: Analysis, node: Node) -> Axes:
    return broadcast(at, [at(i) for i in node.inputs], node.shape)
