"""Which channels of a network can only be removed together, and the network without them.

Every axis of every value carries one label per index. Operations join labels: the input channels of a
convolution are those of its operand, the operands of an addition have the same channels, a concatenation
has those of its operands one after the other, a reshape maps them through its index arithmetic. What is
joined is a group: its indices live or die together, in every weight and every value, wherever branches,
shared weights or attention heads lead. What an operation mixes (a softmax's axis, the axes of a
normalisation, the network's inputs and outputs) is kept, with the reason.

Removing a group is exact: with all its weights zero the network computes the same as without it.

Wang, Rachwan, Guennemann, Charpentier: Structurally Prune Anything, 2024 (mask propagation between
coupled channels); Chen et al.: OTOv3, 2023 (groups whose removal leaves a valid network).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from skive import ops
from skive.ir import FrozenDict, Graph, Node, constant
from skive.types import DType

WINDOW = "a window moves along this axis"  # no channels: not worth a line in a report
Labels = np.ndarray  # [n] int64, the label of each index of an axis


@dataclass(frozen=True)
class Group:
    """Indices that live or die together. `places`: of each constant, per axis, its indices in the group."""

    places: Mapping[Node, Mapping[int, np.ndarray]]
    reason: str | None  # why it must stay; None if it can be removed

    @property
    def label(self) -> str:
        """A layer in which the group stands, for messages."""
        return next((n.label() for n in self.places if n.label() != "const"), "")


@dataclass(frozen=True)
class Groups:
    """The groups of a graph.

    `axes`: of each value, per axis, the group of each index. `families`: groups that stand in the same
    axes of the same weights, such as the channels of a residual stage; only those that can be removed.
    """

    graph: Graph
    axes: Mapping[Node, tuple[Labels, ...]]
    groups: Sequence[Group]
    families: Sequence[tuple[int, ...]] = field(default=())

    @property
    def removable(self) -> list[int]:
        return [i for i, g in enumerate(self.groups) if g.reason is None]

    def kept_sizes(self, removed: np.ndarray, node: Node) -> tuple[int, ...]:
        """The shape of `node` without the groups that `removed` [groups] bool names."""
        return tuple(int(len(a) - np.count_nonzero(removed[a])) for a in self.axes[node])


class _Joins:
    """Union-find over labels."""

    def __init__(self) -> None:
        self.parent: list[int] = []
        self.reasons: dict[int, str] = {}
        self._done: set[tuple[int, int]] = set()
        self._alive: list[Labels] = []  # ids in `_done` stay those of these arrays

    def fresh(self, count: int) -> Labels:
        first = len(self.parent)
        self.parent.extend(range(first, first + count))
        return np.arange(first, first + count)

    def find(self, label: int) -> int:
        parent = self.parent
        while parent[label] != label:
            parent[label] = label = parent[parent[label]]
        return label

    def join(self, a: Labels, b: Labels) -> Labels:
        """Index i of one axis is index i of the other; returns either."""
        assert len(a) == len(b)
        if a is b or (id(a), id(b)) in self._done:
            return a
        self._done.add((id(a), id(b)))
        self._alive += [a, b]
        for x, y in zip(a.tolist(), b.tolist(), strict=True):
            x, y = self.find(x), self.find(y)
            if x != y:
                self.parent[max(x, y)] = min(x, y)
        return a

    def keep(self, labels: Labels, reason: str) -> Labels:
        """These indices must stay."""
        for x in labels.tolist():
            self.reasons.setdefault(x, reason)
        return labels

    def kept(self, count: int, reason: str) -> Labels:
        return self.keep(self.fresh(count), reason)


Axes = tuple[Labels, ...]


class _Analysis:
    """Labels of one graph; `outer`: reshapes that split an axis whose groups are the outer parts."""

    def __init__(self, graph: Graph, outer: set[Node]):
        self.graph, self.outer = graph, outer
        self.joins = _Joins()
        self.axes: dict[Node, Axes] = {}
        for node in graph.nodes:
            axes = _RULES.get(node.op, _rule_of_kind(node.op))(self, node)
            assert tuple(map(len, axes)) == node.shape, f"{node.label()}: {node.op} labelled {list(map(len, axes))}"
            self.axes[node] = axes
        for n in graph.outputs:
            self.keep_all(n, f"an output of the network ({n.label()})")
        for pair in graph.states:
            for n in pair:
                self.keep_all(n, f"a state of the network ({n.label()})")

    def keep_all(self, node: Node, reason: str) -> None:
        for a in self.axes[node]:
            self.joins.keep(a, reason)

    def keep_operands(self, node: Node, reason: str) -> Axes:
        """Nothing of the operands and nothing of the result can be removed."""
        for i in node.inputs:
            self.keep_all(i, reason)
        return tuple(self.joins.kept(d, reason) for d in node.shape)

    def __call__(self, node: Node) -> Axes:
        return self.axes[node]


Rule = Callable[[_Analysis, Node], Axes]
_RULES: dict[str, Rule] = {}


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def register(fn: Rule) -> Rule:
        _RULES.update(dict.fromkeys(names, fn))
        return fn

    return register


def _rule_of_kind(name: str) -> Rule:
    kind = ops.op_of(name).kind
    if kind == "elementwise":
        return _elementwise
    if kind == "reduce":
        return _reduction
    return lambda at, node: at.keep_operands(node, f"{node.op} has no rule ({node.label()})")


# ------------------------------------------------------------------------------------ sources


@_rule("input")
def _input(at: _Analysis, node: Node) -> Axes:
    return tuple(at.joins.kept(d, f"an input of the network ({node.label()})") for d in node.shape)


@_rule("const")
def _const(at: _Analysis, node: Node) -> Axes:
    return tuple(at.joins.fresh(d) for d in node.shape)


# ------------------------------------------------------------------------------------ elementwise


def _broadcast(at: _Analysis, shapes: Sequence[Axes], result: Sequence[int]) -> Axes:
    """Labels of a result of this shape whose operands are broadcast to it."""
    axes = []
    for back in range(len(result), 0, -1):
        d = result[-back]
        full = [a[-back] for a in shapes if len(a) >= back and len(a[-back]) == d]
        assert full
        for other in full[1:]:
            at.joins.join(full[0], other)
        axes.append(full[0])
    return tuple(axes)


def _elementwise(at: _Analysis, node: Node) -> Axes:
    return _broadcast(at, [at(i) for i in node.inputs], node.shape)


# ------------------------------------------------------------------------------------ movement


@_rule("transpose")
def _transpose(at: _Analysis, node: Node) -> Axes:
    return tuple(at(node.inputs[0])[p] for p in node.attrs["perm"])


@_rule("slice")
def _slice(at: _Analysis, node: Node) -> Axes:
    x = node.inputs[0]
    axes = []
    windows = zip(*(node.attrs[k] for k in ("start", "size", "step")), strict=True)
    for a, d, (start, size, step) in zip(at(x), x.shape, windows, strict=True):
        if abs(step) != 1 and size > 1:
            at.joins.keep(a, f"every {abs(step)}th index is taken ({node.label()})")
        taken = np.arange(size) * step + start
        axes.append(a if size == d and step == 1 else a[taken])
    return tuple(axes)


@_rule("concat")
def _concat(at: _Analysis, node: Node) -> Axes:
    along = node.attrs["axis"] % node.type.rank
    parts = [at(i) for i in node.inputs]
    axes = []
    for axis in range(node.type.rank):
        if axis == along:
            axes.append(np.concatenate([p[axis] for p in parts]))
            continue
        for p in parts[1:]:
            at.joins.join(parts[0][axis], p[axis])
        axes.append(parts[0][axis])
    return tuple(axes)


@_rule("pad")
def _pad(at: _Analysis, node: Node) -> Axes:
    axes = []
    for a, before, after in zip(at(node.inputs[0]), node.attrs["before"], node.attrs["after"], strict=True):
        if not before and not after:
            axes.append(a)
        elif node.attrs["mode"] == "constant" and before >= 0 and after >= 0:
            axes.append(np.concatenate([at.joins.fresh(before), a, at.joins.fresh(after)]))
        else:
            at.joins.keep(a, f"the border is made of its elements ({node.label()})")
            axes.append(at.joins.kept(len(a) + before + after, f"padded ({node.label()})"))
    return tuple(axes)


@_rule("expand")
def _expand(at: _Analysis, node: Node) -> Axes:
    x = at(node.inputs[0])
    missing = node.type.rank - len(x)
    return tuple(
        x[i - missing] if i >= missing and len(x[i - missing]) == d else at.joins.fresh(d)
        for i, d in enumerate(node.shape)
    )


def _factors(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The axes of a reshape in the smallest groups of equal product, those of size 1 apart."""
    result: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        a: list[int] = []
        b: list[int] = []
        p = q = 1
        while p != q or not (a or b):
            if i < len(before) and (p < q or (p == q and before[i] == 1) or j >= len(after) or (p == q and not a)):
                p *= before[i]
                a.append(i)
                i += 1
            elif j < len(after):
                q *= after[j]
                b.append(j)
                j += 1
            else:
                break
            if p == q:
                break
        result.append((a, b))
    return result


@_rule("reshape")
def _reshape(at: _Analysis, node: Node) -> Axes:
    x, before, after = at(node.inputs[0]), node.inputs[0].shape, node.shape
    axes: list[Labels] = [np.empty(0, np.int64)] * len(after)
    for sources, results in _factors(before, after):
        wide_in = [i for i in sources if before[i] != 1]
        wide_out = [j for j in results if after[j] != 1]
        for j in results:
            if after[j] == 1:
                axes[j] = at.joins.fresh(1)
        if len(wide_in) == len(wide_out) == 1:
            axes[wide_out[0]] = x[wide_in[0]]
        elif len(wide_in) == 1:
            sizes = [after[j] for j in wide_out]
            carry = 0 if node in at.outer else len(sizes) - 1
            where = np.unravel_index(np.arange(math.prod(sizes)), sizes)[carry]
            for n, j in enumerate(wide_out):
                axes[j] = at.joins.fresh(sizes[n]) if n == carry else at.joins.kept(
                    sizes[n], f"one part of an axis that is split ({node.label()})")
            at.joins.join(x[wide_in[0]], axes[wide_out[carry]][where])
        elif len(wide_out) == 1:
            sizes = [before[i] for i in wide_in]
            carry = _carrier(at, [x[i] for i in wide_in])
            for n, i in enumerate(wide_in):
                if n != carry:
                    at.joins.keep(x[i], f"merged with another axis ({node.label()})")
            where = np.unravel_index(np.arange(math.prod(sizes)), sizes)[carry]
            axes[wide_out[0]] = x[wide_in[carry]][where]
        else:
            for i in wide_in:
                at.joins.keep(x[i], f"reshaped together with other axes ({node.label()})")
            for j in wide_out:
                axes[j] = at.joins.kept(after[j], f"reshaped together with other axes ({node.label()})")
    return tuple(axes)


def _carrier(at: _Analysis, axes: Sequence[Labels]) -> int:
    """Which of several axes that become one stays removable: the last one that is so far."""
    kept = {at.joins.find(x) for x in at.joins.reasons}
    free = [n for n, a in enumerate(axes) if not any(at.joins.find(x) in kept for x in a.tolist())]
    return free[-1] if free else len(axes) - 1


# ------------------------------------------------------------------------------------ indexing


@_rule("gather")
def _gather(at: _Analysis, node: Node) -> Axes:
    data, index = node.inputs
    axis = node.attrs["axis"] % data.type.rank
    x = at(data)
    if index.is_const and index.type.rank == 1:
        return (*x[:axis], x[axis][index.value], *x[axis + 1 :])
    at.joins.keep(x[axis], f"the index is computed at run time ({node.label()})")
    return (*x[:axis], *at(index), *x[axis + 1 :])


# ------------------------------------------------------------------------------------ reductions


def _reduction(at: _Analysis, node: Node) -> Axes:
    x = node.inputs[0]
    if node.op.startswith("topk"):
        axes, keep = {x.type.rank - 1}, True
    elif "axes" in node.attrs:
        axes, keep = {a % x.type.rank for a in node.attrs["axes"]}, node.attrs["keep"]
    else:
        axes, keep = {node.attrs["axis"] % max(x.type.rank, 1)}, node.attrs.get("keep", True)
    result: list[Labels] = []
    for i, a in enumerate(at(x)):
        if i in axes:
            at.joins.keep(a, f"{node.op} over this axis ({node.label()})")
            if keep:
                size = node.shape[len(result)]
                result.append(a if size == len(a) else at.joins.kept(size, f"reduced ({node.label()})"))
        else:
            result.append(a)
    return tuple(result)


@_rule("softmax", "log_softmax")
def _softmax(at: _Analysis, node: Node) -> Axes:
    x = at(node.inputs[0])
    at.joins.keep(x[node.attrs["axis"]], f"softmax over this axis ({node.label()})")
    return x


@_rule("layer_norm", "rms_norm")
def _norm(at: _Analysis, node: Node) -> Axes:
    x = at(node.inputs[0])
    first = node.attrs["axis"] % len(x)
    for a in x[first:]:
        at.joins.keep(a, f"normalised over this axis ({node.label()})")
    for other in node.inputs[1:]:
        _broadcast(at, [x, at(other)], node.shape)
    return x


# ------------------------------------------------------------------------------------ products


@_rule("linear")
def _linear(at: _Analysis, node: Node) -> Axes:
    x, w = at(node.inputs[0]), at(node.inputs[1])
    at.joins.join(w[1], x[-1])
    for bias in node.inputs[2:3]:
        at.joins.join(w[0], at(bias)[0])
    return _with_epilogue(at, node, 3, (*x[:-1], w[0]))


@_rule("matmul")
def _matmul(at: _Analysis, node: Node) -> Axes:
    a, b = at(node.inputs[0]), at(node.inputs[1])
    m, k = a[-2:] if not node.attrs["trans_a"] else (a[-1], a[-2])
    other, n = b[-2:] if not node.attrs["trans_b"] else (b[-1], b[-2])
    at.joins.join(k, other)
    batch = _broadcast(at, [a[:-2], b[:-2]], node.shape[:-2])
    return _with_epilogue(at, node, 2, (*batch, m, n))


def _with_epilogue(at: _Analysis, node: Node, count: int, axes: Axes) -> Axes:
    """The result's labels joined with those of an epilogue's operands."""
    for extra in node.inputs[count:] if node.attrs.get("epilogue") else ():
        _broadcast(at, [axes, at(extra)], node.shape)
    return axes


@_rule("conv2d", "conv_transpose2d")
def _convolution(at: _Analysis, node: Node) -> Axes:
    x, w = at(node.inputs[0]), at(node.inputs[1])
    for a in (*x[1:3], *w[1:3]):
        at.joins.keep(a, f"{WINDOW} ({node.label()})")
    groups = node.attrs["groups"]
    outs, ins = len(w[0]), len(x[3])
    if groups == 1:
        at.joins.join(w[3], x[3])
    elif groups == ins:  # depthwise: an output channel has one input channel
        at.joins.join(w[0], x[3][np.arange(outs) // (outs // ins)])
        at.joins.keep(w[3], f"one input channel per group ({node.label()})")
    else:  # the same positions in every group
        at.joins.join(x[3], np.tile(w[3], groups))
        per_group = w[0].reshape(groups, -1)
        at.joins.join(w[0], np.tile(per_group[0], groups))
    for bias in node.inputs[2:3]:
        at.joins.join(w[0], at(bias)[0])
    spatial = (at.joins.kept(d, f"{WINDOW} ({node.label()})") for d in node.shape[1:3])
    return _with_epilogue(at, node, 3, (x[0], *spatial, w[0]))


@_rule("max_pool2d", "avg_pool2d", "sum_pool2d", "resize2d")
def _window(at: _Analysis, node: Node) -> Axes:
    x = at(node.inputs[0])
    for a in (*x[1:3], *(a for i in node.inputs[1:] for a in at(i))):
        at.joins.keep(a, f"{WINDOW} ({node.label()})")
    spatial = (at.joins.kept(d, f"{WINDOW} ({node.label()})") for d in node.shape[1:3])
    return (x[0], *spatial, x[3])


@_rule("attention")
def _attention(at: _Analysis, node: Node) -> Axes:
    token_major = node.attrs["token_major"]
    heads, tokens = (2, 1) if token_major else (1, 2)
    q, k, v = (at(i) for i in node.inputs[:3])
    at.joins.join(q[3], k[3])
    at.joins.join(k[tokens], v[tokens])
    for axis in (0, heads):
        at.joins.join(q[axis], k[axis])
        at.joins.join(q[axis], v[axis])
    at.joins.keep(k[tokens], f"softmax over this axis ({node.label()})")
    for mask in node.inputs[3:]:
        full = (q[0], q[heads], q[tokens], k[tokens])
        _broadcast(at, [full, at(mask)], tuple(map(len, full)))
    return (q[0], q[1], q[2], v[3])


@_rule("lstm", "gru", "rnn")
def _recurrent(at: _Analysis, node: Node) -> Axes:
    x, w, r, b = (at(i) for i in node.inputs[:4])
    at.joins.join(w[1], x[2])
    hidden = r[1]
    gates = len(r[0]) // len(hidden)
    every = np.tile(hidden, gates)
    for a in (w[0], r[0], b[1]):
        at.joins.join(a, every)
    at.joins.keep(b[0], f"the two biases of a gate ({node.label()})")
    for state in node.inputs[4:6]:
        h = at(state)
        at.joins.join(h[1], hidden)
        at.joins.join(h[0], x[1])
    for peep in node.inputs[6:7]:
        at.joins.join(at(peep)[0], np.tile(hidden, len(at(peep)[0]) // len(hidden)))
    at.joins.keep(x[0], f"time ({node.label()})")
    middle = (at.joins.kept(node.shape[1], f"h and c ({node.label()})"),) if node.type.rank == 4 else ()
    return (x[0], *middle, x[1], hidden)


# ------------------------------------------------------------------------------------ groups


def _splits(graph: Graph) -> list[Node]:
    """The reshapes that make several axes of one."""
    return [
        n for n in graph.nodes if n.op == "reshape" and any(
            sum(n.inputs[0].shape[i] != 1 for i in a) == 1 and sum(n.shape[j] != 1 for j in b) > 1
            for a, b in _factors(n.inputs[0].shape, n.shape))
    ]


def _feeds_heads(graph: Graph, node: Node) -> bool:
    """Whether moves and elementwise functions lead from `node` to attention or a product of activations."""
    todo, seen = [node], set()
    while todo:
        n = todo.pop()
        for u in graph.users[n]:
            if u in seen:
                continue
            seen.add(u)
            if u.op in ("attention", "matmul"):
                return True
            if ops.op_of(u.op).kind in ("movement", "elementwise", "normalize") and u.op != "reshape":
                todo.append(u)
    return False


def channel_groups(graph: Graph) -> Groups:
    """The groups of the canonical `graph`.

    An axis that a reshape splits is removed by its inner parts (the same channels of every block), by its
    outer ones where those are attention heads or the inner ones must stay.
    """
    splits = _splits(graph)
    outer = {n for n in splits if _feeds_heads(graph, n)}
    at = _Analysis(graph, outer)
    for n in splits:
        if n in outer:
            continue
        changed = _Analysis(graph, outer | {n})
        if _free(changed) > _free(at):
            outer.add(n)
            at = changed
    return _collected(at)


def _free(at: _Analysis) -> int:
    """Indices of constants that can be removed."""
    kept = {at.joins.find(x) for x in at.joins.reasons}
    constants = (axes for n, axes in at.axes.items() if n.is_const)
    return sum(at.joins.find(x) not in kept for axes in constants for a in axes for x in a.tolist())


def _collected(at: _Analysis) -> Groups:
    joins = at.joins
    roots = np.fromiter((joins.find(x) for x in range(len(joins.parent))), np.int64, len(joins.parent))
    reasons: dict[int, str] = {}
    for x, reason in joins.reasons.items():
        reasons.setdefault(int(roots[x]), reason)
    number: dict[int, int] = {}
    axes: dict[Node, Axes] = {}
    places: list[dict[Node, dict[int, np.ndarray]]] = []
    for node in at.graph.nodes:
        numbered = []
        for a in at.axes[node]:
            if len(set(roots[a].tolist())) == 1:
                reasons.setdefault(int(roots[a[0]]), f"all there is along an axis ({node.label()})")
            ids = np.fromiter((number.setdefault(int(r), len(number)) for r in roots[a]), np.int64, len(a))
            numbered.append(ids)
        axes[node] = tuple(numbered)
        places.extend({} for _ in range(len(number) - len(places)))
        if node.is_const:
            for axis, ids in enumerate(numbered):
                order = np.argsort(ids, kind="stable")
                bounds = np.flatnonzero(np.diff(ids[order])) + 1
                for part in np.split(order, bounds):
                    if len(part):
                        places[ids[part[0]]].setdefault(node, {})[axis] = part
    by_number = {n: reasons.get(root) for root, n in number.items()}
    groups = [Group(p, by_number[n]) for n, p in enumerate(places)]
    # A group in no weight stands for indices of an axis that nothing computes: nothing to remove.
    groups = [Group(g.places, g.reason if g.reason or g.places else "no weight has it") for g in groups]
    return Groups(at.graph, axes, groups, _families(groups))


def _families(groups: Sequence[Group]) -> tuple[tuple[int, ...], ...]:
    found: dict[frozenset[tuple[Node, int]], list[int]] = {}
    for n, g in enumerate(groups):
        if g.reason is None:
            found.setdefault(frozenset((node, axis) for node, axes in g.places.items() for axis in axes), []).append(n)
    return tuple(map(tuple, found.values()))


# ------------------------------------------------------------------------------------ removal


def without(found: Groups, removed: Iterable[int]) -> Graph:
    """The graph of `found` without these groups; the very same graph if there are none.

    Constants lose their slices; the sizes that reshapes, slices, paddings and groups of channels state are
    computed anew. ValueError if a group must stay or nothing of an axis would be left.
    """
    gone = np.zeros(len(found.groups), bool)
    gone[list(removed)] = True
    if not gone.any():
        return found.graph
    for n in np.flatnonzero(gone).tolist():
        if found.groups[n].reason is not None:
            raise ValueError(f"the group of {found.groups[n].label} must stay: {found.groups[n].reason}")
    new: dict[Node, Node] = {}
    for node in found.graph.nodes:
        keep = [~gone[a] for a in found.axes[node]]
        if any(len(k) and not k.any() for k in keep):
            raise ValueError(f"{node.label()}: nothing would be left of an axis")
        inputs = tuple(new[i] for i in node.inputs)
        if all(k.all() for k in keep) and all(a is b for a, b in zip(inputs, node.inputs, strict=True)):
            new[node] = node
        elif node.is_const:
            new[node] = constant(node.value[np.ix_(*keep)], name=node.name, origin=node.origin)
        else:
            new[node] = _shrunk(node, inputs, keep, [[~gone[a] for a in found.axes[i]] for i in node.inputs])
    return found.graph.with_nodes(new)


def _shrunk(node: Node, inputs: tuple[Node, ...], keep: Sequence[np.ndarray], kept: Sequence[Sequence[np.ndarray]]
            ) -> Node:
    """`node` on its shrunken operands; `keep`: what stays of its axes, `kept`: of those of its operands."""
    shape = tuple(int(k.sum()) for k in keep)
    attrs = dict(node.attrs)
    if node.op in ("reshape", "expand"):
        attrs["shape"] = shape
    elif node.op == "slice":
        start = []
        for b, k, size, step in zip(attrs["start"], kept[0], attrs["size"], attrs["step"], strict=True):
            taken = np.arange(size) * step + b
            left = taken[k[taken]]
            start.append(int(k[: left[0]].sum()) if len(left) else 0)
        attrs["start"], attrs["size"] = tuple(start), shape
    elif node.op == "pad":
        sides = [(int(k[:b].sum()), int(k[len(k) - a :].sum()) if a else 0)
                 for k, b, a in zip(keep, attrs["before"], attrs["after"], strict=True)]
        attrs["before"], attrs["after"] = (tuple(s[i] if s[i] or n >= 0 else n for s, n in zip(sides, attrs[key]))
                                           for i, key in enumerate(("before", "after")))
    elif node.op in ("conv2d", "conv_transpose2d"):
        if attrs["groups"] == node.inputs[0].shape[3] > 1:
            attrs["groups"] = inputs[0].shape[3]
    elif node.op == "gather" and node.inputs[1].is_const and node.inputs[1].type.rank == 1:
        axis = attrs["axis"] % node.inputs[0].type.rank
        k = kept[0][axis]
        index = node.inputs[1].value[keep[axis]]
        moved = (np.cumsum(k) - 1)[np.where(index < 0, index + len(k), index)]
        inputs = (inputs[0], constant(moved.astype(index.dtype), origin=node.inputs[1].origin))
    made = ops.make(node.op, *inputs, origin=node.origin, label=node.name, **FrozenDict(attrs))
    assert made.shape == shape, f"{node.label()}: {made.shape} instead of {shape}"
    return made


def zeroed(found: Groups, removed: Iterable[int]) -> Graph:
    """The graph of `found` with every weight of these groups zero, of the old shape: what `without` equals."""
    gone = np.zeros(len(found.groups), bool)
    gone[list(removed)] = True

    def one(node: Node, inputs: tuple[Node, ...]) -> Node:
        if not node.is_const:
            return node if all(a is b for a, b in zip(inputs, node.inputs, strict=True)) else ops.make(
                node.op, *inputs, origin=node.origin, label=node.name, **node.attrs)
        masks = [gone[a] for a in found.axes[node]]
        if node.dtype in (DType.i64, DType.bool) or not any(m.any() for m in masks):
            return node
        value = node.value.copy()
        for axis, m in enumerate(masks):
            value[(slice(None),) * axis + (m,)] = 0
        return constant(value, name=node.name, origin=node.origin)

    return found.graph.map_nodes(one)
