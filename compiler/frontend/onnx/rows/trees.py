"""Ensembles of decision trees (ai.onnx.ml)."""

from __future__ import annotations

import numpy as np

from skive.errors import InvalidModelError
from skive.frontend.onnx.rows.text import ML
from skive.frontend.onnx.table import Call, Unsupported, onnx_op
from skive.ir import Node
from skive.types import DType

MODES = ("less_equal", "less", "greater_equal", "greater", "equal", "not_equal")
MEMBER = len(MODES)
SUM, AVERAGE = 1, 0


@onnx_op("TreeEnsemble", domain=ML)
def tree_ensemble(c: Call) -> Node:
    """All conditions are evaluated at once; every tree then takes as many steps as the deepest needs.

    Conditions and leaves share one numbering: leaf l is place `nodes + l`, and leads to itself.
    """
    x = c[0]
    features, modes, splits = (np.asarray(c.required(f"nodes_{k}")) for k in ("featureids", "modes", "splits"))
    weights, targets = np.asarray(c.required("leaf_weights")), np.asarray(c.required("leaf_targetids"))
    roots, outputs = np.asarray(c.required("tree_roots")), int(c.attr("n_targets", 1))
    nodes, leaves = len(features), len(weights)
    after = [places(c, branch, nodes, leaves) for branch in ("false", "true")]
    sizes = len(targets), len(modes), len(splits)
    if x.type.rank != 2 or not nodes or not len(roots) or sizes != (leaves, nodes, nodes):
        raise InvalidModelError(f"an ensemble of {nodes} conditions and {leaves} leaves for {x.type}")
    if features.min() < 0 or features.max() >= x.shape[1] or roots.min() < 0 or roots.max() >= nodes:
        raise InvalidModelError("a feature or a root is out of range")
    aggregate, transform = int(c.attr("aggregate_function", SUM)), int(c.attr("post_transform", 0))
    if aggregate not in (SUM, AVERAGE) or transform:
        raise Unsupported(f"TreeEnsemble with aggregate_function {aggregate} and post_transform {transform}")
    steps = depth(after, roots, nodes)
    c.room(max(nodes, len(roots) * outputs) * x.shape[0], "an ensemble")

    met = conditions(c, c.make("gather", x, c.lit(features, np.int64), axis=1), modes, splits)  # [N, nodes]
    met = c.make("pad", met, before=(0, 0), after=(0, leaves), value=False)
    no, yes = (c.lit(a, np.int64) for a in after)
    at = c.lit(np.broadcast_to(roots, (x.shape[0], len(roots))), np.int64)  # [N, trees]
    for _ in range(steps):
        at = c.make("where", c.make("gather_elements", met, at, axis=1), c.make("gather", yes, at, axis=0),
                    c.make("gather", no, at, axis=0))
    leaf = c.make("sub", at, nodes)
    target = c.make("gather", c.lit(targets, np.int64), leaf, axis=0)
    value = c.make("gather", c.lit(weights, x.dtype), leaf, axis=0)
    shape = (*leaf.shape, 1)
    mine = c.make("equal", c.reshape(target, shape), c.lit(np.arange(outputs), np.int64))  # [N, trees, outputs]
    votes = c.make("where", mine, c.reshape(value, shape), c.lit(0, x.dtype))
    return c.make("reduce_mean" if aggregate == AVERAGE else "reduce_sum", votes, axes=(1,), keep=False)


def places(c: Call, branch: str, nodes: int, leaves: int) -> np.ndarray:
    """[nodes + leaves]: where the branch of every condition leads; a leaf to itself."""
    to, is_leaf = (np.asarray(c.required(f"nodes_{branch}{k}"), np.int64) for k in ("nodeids", "leafs"))
    count = np.where(is_leaf, leaves, nodes)
    if to.shape != (nodes,) or is_leaf.shape != (nodes,) or (to < 0).any() or (to >= count).any():
        raise InvalidModelError(f"the {branch} branches lead outside the ensemble")
    return np.concatenate([np.where(is_leaf, to + nodes, to), np.arange(nodes, nodes + leaves)])


def depth(after: list[np.ndarray], roots: np.ndarray, nodes: int) -> int:
    """The number of steps after which every tree has reached a leaf; InvalidModelError for a cycle."""
    reached = np.unique(roots)
    for steps in range(nodes + 1):
        reached = reached[reached < nodes]
        if not len(reached):
            return steps
        reached = np.unique(np.concatenate([a[reached] for a in after]))
    raise InvalidModelError("the tree has a cycle")


def conditions(c: Call, value: Node, modes: np.ndarray, splits: np.ndarray) -> Node:
    """[N, nodes] bool: whether `value`, the feature that each condition looks at, meets it."""
    if modes.max(initial=0) > MEMBER:
        raise InvalidModelError(f"mode {modes.max()} of a condition")
    met: Node | None = None
    for mode in np.unique(modes):
        if mode == MEMBER:
            part = members(c, value, np.flatnonzero(modes == MEMBER))
        else:
            part = c.make(MODES[mode], value, c.lit(splits, value.dtype))
        met = part if met is None else c.make("where", c.lit(modes == mode), part, met)
    assert met is not None
    tracks = np.asarray(c.attr("nodes_missing_value_tracks_true", ())).astype(bool)
    if tracks.any():  # NaN stands for a missing value
        met = c.make("or", met, c.make("and", c.make("is_nan", value), c.lit(tracks)))
    return met


def members(c: Call, value: Node, where: np.ndarray) -> Node:
    """[N, nodes] bool: for the conditions `where`, whether the value is in the condition's set."""
    sets: list[list[float]] = [[]]
    for v in np.asarray(c.required("membership_values")):
        if np.isnan(v):
            sets.append([])
        else:
            sets[-1].append(float(v))
    if len(sets) < len(where):
        raise InvalidModelError(f"{len(sets)} sets for {len(where)} conditions")
    longest = max(map(len, sets))
    table = np.full((longest, value.shape[1]), np.nan)  # equal to nothing
    for node, members_ in zip(where, sets):
        table[:len(members_), node] = members_
    parts = [c.make("equal", value, c.lit(row, value.dtype)) for row in table]
    return c.fold("or", parts) if parts else c.full(value.shape, False, DType.bool)
