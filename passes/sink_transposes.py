"""`sink-transposes`: transposes move through the graph until pairs of them cancel.

An NCHW model reaches the IR as `transpose, conv2d, transpose`. Two phases alternate, each to its
fixpoint: *sink* moves a transpose from the operands of an operation to its result, *raise* moves
one from the result to the operands where that leaves no more bytes to move. The best graph seen
is kept, by the bytes that its transposes move.

Notation: `T_p(x)` has axis i = axis p[i] of x, so T_q(T_p(x)) = T_r(x) with r[i] = p[q[i]].
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from skive import ops
from skive.ir import Graph, Node, constant
from skive.pipeline import pass_
from skive.rewrite import Match, Var, op, rewrite, rule

Perm = tuple[int, ...]


def inverse(p: Sequence[int]) -> Perm:
    """The permutation that undoes `p`."""
    q = [0] * len(p)
    for i, a in enumerate(p):
        q[a] = i
    return tuple(q)


def composed(p: Sequence[int], q: Sequence[int]) -> Perm:
    """r with T_r(x) = T_q(T_p(x))."""
    return tuple(p[i] for i in q)


def is_free(shape: Sequence[int], p: Sequence[int]) -> bool:
    """True if T_p of a tensor of `shape` moves no data: the axes longer than 1 keep their order."""
    moved = [a for a in p if shape[a] != 1]
    return moved == sorted(moved)


def transposed(x: Node, p: Perm) -> Node:
    """T_p(x): of a constant a constant, of a transpose one transpose, of an identity x itself."""
    if x.op == "transpose":
        x, p = x.inputs[0], composed(x.attrs["perm"], p)
    if p == tuple(range(len(p))):
        return x
    if x.is_const:
        return constant(np.ascontiguousarray(x.value.transpose(p)), name=x.name, origin=x.origin)
    return ops.make("transpose", x, perm=p, origin=x.origin)


def moved_bytes(graph: Graph) -> int:
    """Bytes that the transposes of `graph` move."""
    return sum(n.type.bytes for n in graph.nodes
               if n.op == "transpose" and not is_free(n.inputs[0].shape, n.attrs["perm"]))


def without(x: Node, p: Perm) -> Node | None:
    """y with T_p(y) = x, if that costs no movement at run time: x is a constant, undoes itself or
    differs from y by axes of length 1 only."""
    rank = len(p)
    if len(x.shape) < rank:
        padded = (1,) * (rank - len(x.shape)) + x.shape
        x = constant(x.value.reshape(padded), name=x.name, origin=x.origin) if x.is_const else ops.make(
            "reshape", x, shape=padded, origin=x.origin)
    q = inverse(p)
    y = transposed(x, q)
    if y.op != "transpose" or is_free(y.inputs[0].shape, y.attrs["perm"]):
        return y
    return None


# ---------------------------------------------------------------- operations that commute with T_p

REDUCE = "reduce_sum|reduce_mean|reduce_prod|reduce_max|reduce_min"
# Operations whose axes can be renamed: op(T_p(x)...) = T_r(op'(x...)).
_FLEXIBLE = frozenset([*(n for n, o in ops.OPS.items() if o.kind == "elementwise"),
                      *REDUCE.split("|"), "argmax", "argmin", "cumsum", "cumprod", "softmax", "log_softmax",
                      "pad", "slice", "concat", "expand", "gather"])
FLEXIBLE = "|".join(sorted(_FLEXIBLE))


def renamed(node: Node, inputs: Sequence[Node], p: Perm) -> tuple[Node, Perm] | None:
    """(op', r) with T_r(op'(inputs)) = node, where node's operands are T_p of `inputs`."""
    rank, q, a = len(p), inverse(p), dict(node.attrs)
    kind = ops.op_of(node.op).kind
    if kind == "elementwise":
        pass
    elif "axes" in a or node.op in ("argmax", "argmin"):
        one = "axis" in a
        axes = [x % rank for x in ([a["axis"]] if one else a["axes"])]
        new_axes = sorted(p[x] for x in axes)
        if one:
            a["axis"] = new_axes[0]
        else:
            a["axes"] = tuple(new_axes)
        if not a["keep"]:
            left = [x for x in range(rank) if x not in new_axes]  # axes of the operand that remain
            kept = [p[i] for i in range(rank) if i not in axes]
            return ops.make(node.op, *inputs, origin=node.origin, label=node.name, **a), tuple(map(left.index, kept))
    elif node.op in ("softmax", "log_softmax"):
        axis = p[a["axis"] % rank]
        # Along the last axis it runs over contiguous memory: do not trade that for a transpose of
        # a tensor that is read once.
        if a["axis"] % rank == rank - 1 and axis != rank - 1:
            return None
        a["axis"] = axis
    elif node.op in ("cumsum", "cumprod", "concat"):
        a["axis"] = p[a["axis"] % rank]
    elif node.op == "gather":
        if inputs[1].type.rank != 1:
            return None
        a["axis"] = p[a["axis"] % rank]
    elif node.op == "pad":
        a["before"], a["after"] = ([a[k][q[i]] for i in range(rank)] for k in ("before", "after"))
        a["before"], a["after"] = tuple(a["before"]), tuple(a["after"])
    elif node.op == "slice":
        for k in ("start", "size", "step"):
            a[k] = tuple(a[k][q[i]] for i in range(rank))
    elif node.op == "expand":
        extra = len(a["shape"]) - rank  # new axes come in front and stay there
        tail = a["shape"][extra:]
        a["shape"] = (*a["shape"][:extra], *(tail[q[i]] for i in range(rank)))
        p = (*range(extra), *(i + extra for i in p))
    else:
        return None
    return ops.make(node.op, *inputs, origin=node.origin, label=node.name, **a), p


def _data_operands(node: Node) -> tuple[Node, ...]:
    return node.inputs[:1] if node.op == "gather" else node.inputs


def _groups(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """How a reshape splits and merges: (axes of `before`, axes of `after`) of equal size, without
    axes of length 1."""
    b = [i for i, d in enumerate(before) if d != 1]
    a = [i for i, d in enumerate(after) if d != 1]
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(b) or j < len(a):
        left, right = [b[i]], [a[j]]
        m, n = before[b[i]], after[a[j]]
        i, j = i + 1, j + 1
        while m != n:
            if m < n:
                m *= before[b[i]]
                left.append(b[i])
                i += 1
            else:
                n *= after[a[j]]
                right.append(a[j])
                j += 1
        groups.append((left, right))
    return groups


def through_reshape(source: Sequence[int], p: Perm, shape: Sequence[int]) -> tuple[Perm, tuple[int, ...], Perm] | None:
    """(s, mid, r) with reshape(T_p(x), shape) = T_r(reshape(T_s(x), mid)) for x of shape `source`.

    s only permutes axes that the reshape merges; None if the axes it merges are not neighbours in x.
    """
    if 0 in source:
        return None
    groups = _groups([source[a] for a in p], shape)
    order = [a for a in range(len(source)) if source[a] != 1]
    placed: list[tuple[int, list[int], list[int]]] = []
    for left, right in groups:
        axes = [p[i] for i in left]
        where = sorted(order.index(a) for a in axes)
        if where != list(range(where[0], where[0] + len(where))):
            return None
        placed.append((where[0], axes, right))
    placed.sort(key=lambda g: g[0])
    wide = iter([a for _, axes, _ in placed for a in axes])
    s = tuple(a if source[a] == 1 else next(wide) for a in range(len(source)))
    out = [i for _, _, right in placed for i in right]
    for i, d in enumerate(shape):  # axes of length 1 stay behind their left neighbour
        if d == 1:
            out.insert(out.index(i - 1) + 1 if i else 0, i)
    return s, tuple(shape[i] for i in out), inverse(out)


# ------------------------------------------------------------------------------------ sinking rules


@rule(op("transpose", op("transpose", name="inner")))
def compose(m: Match) -> Node | None:
    return transposed(m["inner"], m.root.attrs["perm"])


@rule(op("transpose", where=lambda n: n.attrs["perm"] == tuple(range(n.type.rank))))
def drop_identity(m: Match) -> Node | None:
    return m.root.inputs[0]


def _transposes(nodes: Sequence[Node]) -> tuple[int, int]:
    """(those that move data, all) among `nodes`."""
    found = [n for n in nodes if n.op == "transpose"]
    return sum(not is_free(n.inputs[0].shape, n.attrs["perm"]) for n in found), len(found)


def _sink(m: Match) -> Node | None:
    node = m.root
    data = _data_operands(node)
    rank = max((len(i.shape) for i in data), default=0)
    # The widest real transpose among the operands says where to go; free ones follow it.
    perms = sorted({(is_free(i.inputs[0].shape, i.attrs["perm"]), -i.type.bytes, i.attrs["perm"])
                    for i in data if i.op == "transpose" and len(i.shape) == rank})
    for _, _, p in perms:
        inputs = [i if i.type.size == 1 and len(i.shape) == 0 else without(i, p) for i in data]
        # Fewer transposes than before, those that move data first: free ones cannot take turns.
        if any(i is None for i in inputs) or _transposes(inputs) >= _transposes(data):  # type: ignore[arg-type]
            continue
        new = renamed(node, [*inputs, *node.inputs[len(data):]], p)  # type: ignore[list-item]
        if new is not None:
            return transposed(*new)
    return None


@rule(op("reshape", op("transpose", name="t")))
def sink_through_reshape(m: Match) -> Node | None:
    t = m["t"]
    x, p, shape = t.inputs[0], t.attrs["perm"], m.root.attrs["shape"]
    split = through_reshape(x.shape, p, shape)
    if split is None:
        return None
    s, mid, r = split
    if s == p:
        return None
    return transposed(ops.make("reshape", transposed(x, s), shape=mid, origin=m.root.origin), r)


def _refinement(before: Sequence[int], after: Sequence[int]) -> tuple[int, ...] | None:
    """The shape from which both shapes arise by merging neighbours; None if there is none."""
    sizes = sorted({math.prod(shape[:i]) for shape in (before, after) for i in range(len(shape) + 1)})
    if sizes[0] == 0 or any(big % small for small, big in zip(sizes, sizes[1:])):
        return None
    return tuple(big // small for small, big in zip(sizes, sizes[1:]))


@rule(op("reshape", op("transpose", name="t")))
def split_before_merging(m: Match) -> Node | None:
    """A reshape that splits one axis and merges a part of it with others, as group normalization does,
    is a split, through which the transpose moves, and a merge, which `sink_merge` moves."""
    t = m["t"]
    x, p, shape = t.inputs[0], t.attrs["perm"], m.root.shape
    if is_free(x.shape, p):
        return None
    lead = next((i for i, d in enumerate(t.shape) if d != 1), len(t.shape))
    fine = _refinement(t.shape, shape)
    if fine is None:
        return None
    fine = (1,) * lead + fine  # a batch of one stays an axis
    split = through_reshape(x.shape, p, fine)
    if split is None or split[0] != tuple(range(len(p))) or len(fine) <= len(t.shape):
        return None
    middle = ops.make("reshape", x, shape=split[1], origin=m.root.origin)
    return ops.make("reshape", transposed(middle, split[2]), shape=shape, origin=m.root.origin)


def _merged_axes(fine: Sequence[int], shape: Sequence[int]) -> list[list[int]] | None:
    """For each axis of `shape` the axes of `fine` that it merges; None if the reshape is no such merge."""
    found: list[list[int]] = []
    i, surplus = 0, len(fine) - len(shape)
    for d in shape:
        axes: list[int] = []
        size = 1
        while i < len(fine) and (not axes or size < d or (fine[i] == 1 and surplus > 0)):
            surplus -= bool(axes)  # every axis after the first is one less for the others
            size *= fine[i]
            axes.append(i)
            i += 1
        if size != d or not axes:
            return None
        found.append(axes)
    return found if i == len(fine) else None


@rule(op("|".join([*(n for n, o in ops.OPS.items() if o.kind == "elementwise"), REDUCE])))
def sink_merge(m: Match) -> Node | None:
    """op(merge(T_p(x))) = merge(op'(T_p(x))), so that the transpose can go on through op'."""
    root = m.root
    merge = next((i for i in root.inputs if i.op == "reshape" and i.inputs[0].op == "transpose"), None)
    if merge is None or is_free(merge.inputs[0].inputs[0].shape, merge.inputs[0].attrs["perm"]):
        return None
    fine, shape = merge.inputs[0].shape, merge.shape
    axes = _merged_axes(fine, shape)
    if axes is None or len(fine) <= len(shape):
        return None
    attrs = dict(root.attrs)
    if "axes" in attrs:
        attrs["axes"] = tuple(a for axis in attrs["axes"] for a in axes[axis % len(shape)])
        moved = ops.make(root.op, merge.inputs[0], origin=root.origin, label=root.name, **attrs)
        return ops.make("reshape", moved, shape=root.shape, origin=root.origin)
    if root.shape != shape:
        return None
    inputs = []
    for i in root.inputs:
        lead = len(shape) - len(i.shape)
        target = [fine[a] if d != 1 or shape[axis + lead] == 1 else 1
                  for axis, d in enumerate(i.shape) for a in axes[axis + lead]]
        inputs.append(_reshaped(i, tuple(target)))
    moved = ops.make(root.op, *inputs, origin=root.origin, label=root.name, **attrs)
    return ops.make("reshape", moved, shape=shape, origin=root.origin)


def _reshaped(x: Node, shape: tuple[int, ...]) -> Node:
    """`x` in `shape`: of a constant a constant, of a reshape one reshape or nothing."""
    if x.is_const:
        return constant(x.value.reshape(shape), name=x.name, origin=x.origin)
    if x.op == "reshape":
        x = x.inputs[0]
    return x if x.shape == shape else ops.make("reshape", x, shape=shape, origin=x.origin)


@rule(op("reshape", op("reshape", name="r")))
def one_reshape(m: Match) -> Node | None:
    return _reshaped(m["r"], m.root.shape)


@rule(op("linear", op("reshape", op("transpose", name="t"), name="r"), Var("w")))
def fold_into_columns(m: Match) -> Node | None:
    return _fold_into_columns(m)


@rule(op("linear", op("reshape", op("transpose", name="t"), name="r"), Var("w"), Var("b")))
def fold_into_columns_with_bias(m: Match) -> Node | None:
    return _fold_into_columns(m)


def _fold_into_columns(m: Match) -> Node | None:
    """linear(flatten(T_p(x)), w): the order in which the flattened features are read, moved into w."""
    t, r, w = m["t"], m["r"], m["w"]
    x, p = t.inputs[0], t.attrs["perm"]
    tail, size = len(t.shape), 1
    while tail > 0 and size < r.shape[-1]:
        tail -= 1
        size *= t.shape[tail]
    if size != r.shape[-1] or p[:tail] != tuple(range(tail)):
        return None
    # Axis j of the features of T_p(x) is axis p[tail + j] of x: undo that in each row of w.
    weights = _columns_moved(w, t.shape[tail:], inverse([a - tail for a in p[tail:]]))
    if weights is None:
        return None
    flat = ops.make("reshape", x, shape=r.shape, origin=r.origin)
    return ops.make("linear", flat, weights, *m.root.inputs[2:], origin=m.root.origin, label=m.root.name,
                    **m.root.attrs)


def _columns_moved(w: Node, features: tuple[int, ...], order: Perm) -> Node | None:
    """Constant weights, quantized or not, with each row [features] transposed by `order`; None of others."""
    if w.op == "dequantize" and all(i.is_const and math.prod(i.shape[1:]) == 1 for i in w.inputs[1:]):
        q = _columns_moved(w.inputs[0], features, order)
        return None if q is None else ops.make("dequantize", q, *w.inputs[1:], origin=w.origin, label=w.name)
    if not w.is_const:
        return None
    columns = w.value.reshape((w.shape[0], *features)).transpose((0, *(1 + i for i in order)))
    return constant(np.ascontiguousarray(columns).reshape(w.shape), name=w.name, origin=w.origin)


def _contracted(m: Match, axis: int, matrix: Node) -> Node | None:
    """T_p(x) contracted with `matrix` [O, K] along `axis` of T_p(x), as T_p of the same along an axis of x.

    Where that axis is not the last of x, it is a product with the matrix from the left.
    """
    t = m["t"]
    x, p = t.inputs[0], t.attrs["perm"]
    if is_free(x.shape, p) or not m.root.dtype.is_float:
        return None
    a, origin = p[axis], m.root.origin
    shape = (*x.shape[:a], matrix.shape[0], *x.shape[a + 1:])
    if a == x.type.rank - 1:
        return transposed(ops.make("linear", x, matrix, origin=origin), p)
    flat = ops.make("reshape", x, origin=origin, shape=(math.prod(x.shape[:a]), x.shape[a], math.prod(x.shape[a + 1:])))
    product = ops.make("matmul", matrix, flat, origin=origin, label=m.root.name)
    return transposed(ops.make("reshape", product, shape=shape, origin=origin), p)


@rule(op("matmul", op("const", name="w", where=lambda n: n.type.rank == 2), op("transpose", name="t"),
         where=lambda n: not n.attrs["trans_a"] and not n.attrs["trans_b"]))
def sink_through_product(m: Match) -> Node | None:
    """A constant matrix from the left, such as an interpolation along the image's rows."""
    return _contracted(m, -2, m["w"])


@rule(op("linear", op("transpose", name="t"), op("const", name="w")))
def sink_through_linear(m: Match) -> Node | None:
    """Only without a bias: a linear layer with one has an epilogue to keep."""
    return _contracted(m, -1, m["w"])


# ------------------------------------------------------------------------------------ raising rules


def _raisable(node: Node, p: Perm) -> bool:
    """True if `renamed(node, ..., p)` gives (op', p)."""
    if node.op not in _FLEXIBLE or node.op in ("gather", "argmax", "argmin") or "axes" in node.attrs:
        return False
    last = node.type.rank - 1
    return ops.op_of(node.op).kind != "normalize" or node.attrs["axis"] % (last + 1) != last or p[last] == last


def _raised_operands(m: Match, node: Node, p: Perm) -> tuple[list[Node | None], int] | None:
    """(the operands of op' where T_q(op(...)) = op'(...), None for those that need a transpose; bytes of
    transposes of `node`'s operands that go). None if an operand cannot be transposed."""
    inputs: list[Node | None] = []
    saved = 0
    for i in node.inputs:
        if i.op == "transpose" and m.only_use(i) and not is_free(i.inputs[0].shape, i.attrs["perm"]):
            saved += i.type.bytes
        y = without(i, p) if i.shape else i
        if y is None and len(i.shape) < len(p):
            return None
        inputs.append(y)
    return inputs, saved


@rule(op("transpose", op(FLEXIBLE, name="node", exclusive=True)))
def raise_through(m: Match) -> Node | None:
    """T_q(op(...)) as op'(T_q(...)...) where the operands then move no more bytes than the result did.

    A chain of such operations is passed in one step, so that its length costs no sweeps.
    """
    q, node = m.root.attrs["perm"], m["node"]
    p = inverse(q)
    levels: list[tuple[Node, list[Node | None]]] = []
    before = 0 if is_free(node.shape, q) else m.root.type.bytes
    while _raisable(node, p):
        found = _raised_operands(m, node, p)
        if found is None:
            break
        inputs, saved = found
        waiting = [i for i, y in zip(node.inputs, inputs, strict=True) if y is None]
        after = sum(0 if is_free(i.shape, q) else i.type.bytes for i in waiting)
        if after > before + saved:
            break
        levels.append((node, inputs))
        if len(waiting) != 1 or not m.only_use(waiting[0]):
            break
        node, before = waiting[0], after
    result: Node | None = None
    for node, inputs in reversed(levels):
        operands = [y if y is not None else result if result is not None else transposed(i, q)
                    for i, y in zip(node.inputs, inputs, strict=True)]
        new = renamed(node, operands, p)
        if new is None or new[1] != p:
            return None
        result = new[0]
    return result


@rule(op("transpose", op("reshape", op("transpose|reshape", name="y"), name="r", exclusive=True)))
def raise_through_reshape(m: Match) -> Node | None:
    """T_q(reshape(T_c(x))): depth-to-space followed by a change of layout becomes one transpose."""
    q, y = m.root.attrs["perm"], m["y"]
    split = through_reshape(m.root.shape, inverse(q), y.shape)
    if split is None or split[0] != tuple(range(len(q))):
        return None
    return ops.make("reshape", transposed(y, inverse(split[2])), shape=m.root.shape, origin=m.root.origin)


SINK = [compose, drop_identity, one_reshape, rule(op(FLEXIBLE), _sink), sink_through_reshape, split_before_merging,
        sink_merge, fold_into_columns, fold_into_columns_with_bias, sink_through_product, sink_through_linear]
RAISE = [compose, drop_identity, raise_through, raise_through_reshape]


@pass_("sink-transposes", exact=True)
def sink_transposes(graph: Graph, options: object) -> Graph:
    """A graph whose transposes move as few bytes as the two phases find; never more than before."""
    best, cost = graph, moved_bytes(graph)
    for rules in (SINK, RAISE, SINK, RAISE):
        graph = rewrite(graph, rules)
        if graph is not best and moved_bytes(graph) <= cost:
            best, cost = graph, moved_bytes(graph)
    return best
