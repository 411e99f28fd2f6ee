"""`recognise-patterns`: compositions that the op table has a name for become that one operation.

Exporters spell activations, normalizations and attention in elementary operations. Each rule below
shows the formula it looks for; commutative operands may stand in either order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from skive import ops
from skive.errors import ShapeError
from skive.ir import Graph, Node, constant
from skive.passes.eliminate_identity import slice_of_slice
from skive.pipeline import pass_
from skive.rewrite import Const, Declined, Match, OpPattern, Pattern, Rule, Var, op, rewrite, rule, scalar
from skive.types import DType

RELATIVE = 2e-5  # irrational literals such as 0.70711 or 1.41421 are written with few digits
X = Var("x")


def near(value: float) -> Const:
    """A constant that is `value` up to the digits people write."""
    return scalar(value, relative=RELATIVE)


def _make(m: Match, name: str, *inputs: Node, **attrs: object) -> Node:
    return ops.make(name, *inputs, origin=m.root.origin, label=m.root.name, **attrs)


def becomes(name: str, pattern: OpPattern, **attrs: object) -> Rule:
    """The rule `pattern -> name(x)`, for a pattern that captures x."""

    def fn(m: Match) -> Node | None:
        x = m["x"]
        return _make(m, name, x, **attrs) if x.dtype.is_float and x.type == m.root.type else None

    return Rule(name.replace("_", "-"), pattern, fn)


# ------------------------------------------------------------------------------------ activations


def _times(*factors: Pattern) -> list[OpPattern]:
    """Every way to multiply three factors in two steps."""
    a, b, c = factors
    return [op("mul", op("mul", a, b), c), op("mul", op("mul", a, c), b), op("mul", op("mul", b, c), a)]


def _divided(x: Pattern, by: float) -> list[OpPattern]:
    return [op("div", x, near(by)), op("mul", x, near(1 / by))]


_ERF = [op("add", op("erf", inner), scalar(1)) for inner in _divided(X, math.sqrt(2))]
_CUBES = [op("pow", X, scalar(3)), op("mul", X, op("mul", X, X)), op("mul", X, op("pow", X, scalar(2)))]
_POLYNOMIALS = [op("add", X, op("mul", cube, near(0.044715))) for cube in _CUBES]
_TANH = [op("add", op("tanh", op("mul", p, near(math.sqrt(2 / math.pi)))), scalar(1)) for p in _POLYNOMIALS]
_CLIPPED = op("clip", op("add", X, scalar(3)), where=lambda n: (n.attrs["lo"], n.attrs["hi"]) == (0, 6))


def _hard_sigmoid_of_six(node: Node) -> bool:
    return abs(node.attrs["alpha"] - 1 / 6) < 1e-6 and node.attrs["beta"] == 0.5


ACTIVATIONS: list[Rule] = [
    # x/2 (1 + erf(x / sqrt 2)); the halves of Hendrycks and Gimpel's GELU in any order
    *(becomes("gelu", p) for e in _ERF for p in [*_times(X, e, scalar(0.5)), *_divided(op("mul", X, e), 2)]),
    # x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))
    *(becomes("gelu_tanh", p) for t in _TANH for p in _times(X, t, scalar(0.5))),
    becomes("silu", op("mul", X, op("sigmoid", X))),
    becomes("silu", op("div", X, op("add", op("exp", op("neg", X)), scalar(1)))),
    becomes("hard_swish", op("mul", X, op("hard_sigmoid", X, where=_hard_sigmoid_of_six))),
    *(becomes("hard_swish", p) for p in [*_divided(op("mul", X, _CLIPPED), 6),
                                         *(op("mul", X, d) for d in _divided(_CLIPPED, 6)),
                                         *(op("mul", d, _CLIPPED) for d in _divided(X, 6))]),
    *(becomes("hard_sigmoid", p, alpha=1 / 6, beta=0.5) for p in _divided(_CLIPPED, 6)),
    becomes("softplus", op("log", op("add", op("exp", X), scalar(1)))),
    becomes("mish", op("mul", X, op("tanh", op("softplus", X)))),
    becomes("sigmoid", op("reciprocal", op("add", op("exp", op("neg", X)), scalar(1)))),
    becomes("sigmoid", op("div", scalar(1), op("add", op("exp", op("neg", X)), scalar(1)))),
    becomes("rsqrt", op("reciprocal", op("sqrt", X))),
    becomes("rsqrt", op("div", scalar(1), op("sqrt", X))),
    becomes("reciprocal", op("div", scalar(1), X)),
    becomes("sqrt", op("pow", X, scalar(0.5))),
    becomes("rsqrt", op("pow", X, scalar(-0.5))),
    becomes("reciprocal", op("pow", X, scalar(-1))),
]


@rule(op("log", op("softmax", X, name="p")))
def log_softmax(m: Match) -> Node | None:
    return _make(m, "log_softmax", m["x"], axis=m["p"].attrs["axis"])


@rule(op("pow", X, scalar(2)))
def square(m: Match) -> Node | None:
    return _make(m, "mul", m["x"], m["x"]) if m["x"].type == m.root.type else None


# ------------------------------------------------------------------------------------ softmax

_EXP = [op("exp", op("sub", X, op("reduce_max", X, name="top")), name="e"), op("exp", X, name="e")]


def _softmax(m: Match) -> Node | None:
    total = m["total"]
    axes = total.attrs["axes"]
    if len(axes) != 1 or not total.attrs["keep"]:
        return None
    top = m.captures.get("top")
    if top is not None and (top.attrs["axes"] != axes or not top.attrs["keep"]):
        return None
    return _make(m, "softmax", m["x"], axis=axes[0])


# exp(x - max x) / sum exp(x - max x), with or without the subtraction
SOFTMAX = [rule(op("div", e, op("reduce_sum", e, name="total")), _softmax) for e in _EXP]


@rule(op("log_softmax|softmax", where=lambda n: n.attrs["axis"] < 0))
def positive_axis(m: Match) -> Node | None:
    return _make(m, m.root.op, m.root.inputs[0], axis=m.root.attrs["axis"] % m.root.type.rank)


# ------------------------------------------------------------------------------------ normalization


def _trailing(node: Node) -> int | None:
    """The first axis that the reduction `node` covers, if it covers all axes from there."""
    axes, rank = sorted(a % node.inputs[0].type.rank for a in node.attrs["axes"]), node.inputs[0].type.rank
    return axes[0] if axes and node.attrs["keep"] and axes == list(range(axes[0], rank)) else None


def _small(c: np.ndarray) -> bool:
    return c.size == 1 and 0 <= float(c.flat[0]) < 1


def _mean_square(d: Pattern) -> list[OpPattern]:
    return [op("reduce_mean", op("mul", d, d), name="var"), op("reduce_mean", op("pow", d, scalar(2)), name="var")]


def _over_root(d: Pattern) -> list[OpPattern]:
    """d / sqrt(mean(d^2) + eps), written with a division, a reciprocal or rsqrt."""
    found = []
    for var in _mean_square(d):
        shifted = op("add", var, Const("eps", _small))
        found += [op("div", d, op("sqrt", shifted)), op("mul", d, op("reciprocal", op("sqrt", shifted))),
                  op("mul", d, op("rsqrt", shifted)), op("mul", d, op("div", scalar(1), op("sqrt", shifted)))]
    return found


def _ones(shape: tuple[int, ...], like: Node) -> Node:
    return constant(np.ones(shape, like.dtype.numpy))


def _layer_norm(m: Match) -> Node | None:
    axis = _trailing(m["var"])
    if axis is None or _trailing(m["mean"]) != axis or not m["x"].dtype.is_float:
        return None
    x = m["x"]
    return _make(m, "layer_norm", x, _ones(x.shape[axis:], x), axis=axis, eps=float(m["eps"].value.flat[0]))


def _rms_norm(m: Match) -> Node | None:
    axis = _trailing(m["var"])
    if axis is None or not m["x"].dtype.is_float:
        return None
    x = m["x"]
    return _make(m, "rms_norm", x, _ones(x.shape[axis:], x), axis=axis, eps=float(m["eps"].value.flat[0]))


def _over_length(x: Pattern) -> list[OpPattern]:
    """x / sqrt(sum(x^2)), the length or its square bounded below or not."""
    total = op("reduce_sum", op("mul", x, x), name="total")

    def bounded(v: OpPattern, name: str) -> OpPattern:
        return op("clip", v, name=name, where=lambda n: n.attrs["hi"] == math.inf and n.attrs["lo"] > 1e-38)

    squares = [total, bounded(total, "square")]
    lengths = [*(op("sqrt", s) for s in squares), bounded(op("sqrt", total), "length")]
    return [*(op("div", x, length) for length in lengths), *(op("mul", x, op("reciprocal", n)) for n in lengths),
            *(op("mul", x, op("rsqrt", s)) for s in squares)]


def _l2_norm(m: Match) -> Node | None:
    axis = _trailing(m["total"])
    if axis is None or m["x"].dtype is not DType.f32:
        return None
    least = 0.0
    if "length" in m.captures:
        least = float(m["length"].attrs["lo"])
    elif "square" in m.captures:
        least = math.sqrt(m["square"].attrs["lo"])
    return _make(m, "l2_norm", m["x"], axis=axis, least=float(np.float32(least)))


def _instance_norm(m: Match) -> Node | None:
    """Of channels-last x: over every axis but the first and the last."""
    x = m["x"]
    places = list(range(1, x.type.rank - 1))
    means = (m["mean"], m["var"])
    if not places or x.dtype is not DType.f32 or not x.type.size or not all(
            n.attrs["keep"] and sorted(a % x.type.rank for a in n.attrs["axes"]) == places for n in means):
        return None
    channels = x.shape[-1]
    return _make(m, "group_norm", x, _ones((channels,), x), groups=channels, eps=float(m["eps"].value.flat[0]))


@rule(op("reshape", op("transpose", op("group_norm", op("transpose", op("reshape", X, name="split")), Const("scale"),
                                       Const("bias"), name="norm"))))
def group_norm_by_instance(m: Match) -> Node | None:
    """Group normalisation as PyTorch exports it: instance normalisation of x [N, C, ...] as [N, groups, rest]."""
    x, split, norm = m["x"], m["split"], m["norm"]
    apart = norm.attrs["groups"] == norm.shape[-1] == split.shape[1] and split.type.rank == 3
    swapped = all(n.attrs["perm"] == (0, 2, 1) for n in (norm.inputs[0], m.root.inputs[0]))
    if not (apart and swapped and m.root.type == x.type and x.type.rank > 2 and split.shape[0] == x.shape[0]
            and x.shape[1] % split.shape[1] == 0):
        return None
    groups, rank = split.shape[1], x.type.rank
    last = (0, *range(2, rank), 1)
    operands = [constant(np.repeat(m[n].value, x.shape[1] // groups)) for n in ("scale", "bias")]
    y = ops.make("transpose", x, perm=last, origin=m.root.origin)
    y = ops.make("group_norm", y, *operands, groups=groups, eps=norm.attrs["eps"], origin=m.root.origin)
    return _make(m, "transpose", y, perm=(0, rank - 1, *range(1, rank - 1)))


_CENTRED = op("sub", X, op("reduce_mean", X, name="mean"), name="d")
# Layer norm first: it is an rms norm of x - mean.
NORMS = [*(rule(p, fn) for p in _over_root(_CENTRED) for fn in (_layer_norm, _instance_norm)),
         *(rule(p, _rms_norm) for p in _over_root(X)), *(rule(p, _l2_norm) for p in _over_length(X))]


def _norm_vector(c: Node, norm: Node) -> np.ndarray | None:
    """The constant `c` in the shape of the scale of `norm`; None if it does not broadcast to it alone."""
    tail = norm.inputs[1].shape
    lead = c.shape[:max(len(c.shape) - len(tail), 0)]
    if any(d != 1 for d in lead):
        return None
    try:
        return np.broadcast_to(c.value.reshape(c.shape[len(lead):]), tail)
    except ValueError:
        return None


@rule(op("mul", op("group_norm|layer_norm|rms_norm", name="norm", exclusive=True,
                   where=lambda n: all(i.is_const for i in n.inputs[1:])), Const("c")))
def norm_scale(m: Match) -> Node | Declined | None:
    norm, c = m["norm"], _norm_vector(m["c"], m["norm"])
    if c is None or m.root.shape != norm.shape:
        return Declined("the factor does not have the shape of the scale")
    return _make(m, norm.op, norm.inputs[0], *(constant(i.value * c) for i in norm.inputs[1:]), **norm.attrs)


@rule(op("add", op("group_norm|layer_norm", name="norm", exclusive=True,
                   where=lambda n: all(i.is_const for i in n.inputs[1:])), Const("c")))
def norm_shift(m: Match) -> Node | Declined | None:
    norm, c = m["norm"], _norm_vector(m["c"], m["norm"])
    if c is None or m.root.shape != norm.shape:
        return Declined("the summand does not have the shape of the bias")
    bias = c + norm.inputs[2].value if len(norm.inputs) > 2 else c
    return _make(m, norm.op, norm.inputs[0], norm.inputs[1], constant(np.array(bias)), **norm.attrs)


# ------------------------------------------------------------------------------------ contractions


@rule(op("matmul", X, Const("w"), where=lambda n: not n.attrs["trans_a"] and n.dtype is DType.f32))
def matmul_by_constant(m: Match) -> Node | Declined | None:
    """x W with a constant float32 matrix W [K, N] is linear with weights W^T [N, K]."""
    w = m["w"].value
    while w.ndim > 2 and w.shape[0] == 1:
        w = w[0]
    if w.ndim != 2:
        return Declined("the constant is a batch of matrices")
    if m["x"].type.rank != m.root.type.rank:
        return None
    weights = np.ascontiguousarray(w if m.root.attrs["trans_b"] else w.T)
    return _make(m, "linear", m["x"], constant(weights, name=m["w"].name, origin=m["w"].origin))


def _scalar_factor(node: Node, m: Match) -> tuple[Node, float]:
    """(y, c) with node = c y, where the factor is a constant and nothing else reads `node`."""
    if node.op in ("mul", "div") and m.only_use(node):
        a, b = node.inputs
        if a.is_const and node.op == "mul":
            a, b = b, a
        if b.is_const and b.type.size == 1 and a.shape == node.shape:
            c = float(b.value.flat[0])
            if node.op == "mul":
                return a, c
            if c != 0:
                return a, 1 / c
    if node.op == "transpose" and m.only_use(node):  # a scale before the transposition
        y, c = _scalar_factor(node.inputs[0], m)
        if y is not node.inputs[0]:
            return ops.make("transpose", y, perm=node.attrs["perm"], origin=node.origin), c
    return node, 1.0


def _swapped(node: Node) -> Node:
    """`node` with its last two axes exchanged; a transpose is composed, not stacked."""
    rank = node.type.rank
    perm = (*range(rank - 2), rank - 1, rank - 2)
    if node.op == "transpose":
        inner = node.attrs["perm"]
        perm = tuple(inner[i] for i in perm)
        node = node.inputs[0]
    return node if perm == tuple(range(rank)) else ops.make("transpose", node, perm=perm, origin=node.origin)


def _is_causal(mask: np.ndarray, shape: tuple[int, ...]) -> bool:
    """True for a mask that is 0 up to the diagonal and minus infinity (or float32's least) beyond."""
    if shape[-1] != shape[-2] or mask.shape[-2:] != shape[-2:] or any(d != 1 for d in mask.shape[:-2]):
        return False
    square, above = mask.reshape(shape[-2:]), np.triu(np.ones(shape[-2:], bool), 1)
    return bool((square[~above] == 0).all() and (square[above] < -1e30).all())


@rule(op("matmul", op("softmax", name="p", exclusive=True), Var("v"),
         where=lambda n: not n.attrs["trans_a"] and not n.attrs["trans_b"]))
def scaled_dot_product(m: Match) -> Node | Declined | None:
    """softmax(q k^T scale + mask) v (Vaswani et al.: Attention Is All You Need, 2017)."""
    p, v = m["p"], m["v"]
    rank = m.root.type.rank
    if p.attrs["axis"] % rank != rank - 1 or rank not in (3, 4) or m.root.dtype.value != "f32":
        return None
    scores, mask, scale = p.inputs[0], None, 1.0
    if scores.op == "add" and m.only_use(scores):
        a, b = scores.inputs
        # The mask is the summand that does not come from the product.
        if b.op in ("matmul", "mul", "div") and not (a.op in ("matmul", "mul", "div") and a.shape == scores.shape):
            a, b = b, a
        scores, mask = a, b
    while m.only_use(scores):
        inner, factor = _scalar_factor(scores, m)
        if inner is scores:
            break
        scores, scale = inner, scale * factor
    if scores.op != "matmul" or not m.only_use(scores) or scores.attrs["trans_a"]:
        return Declined("the scores are not one scaled product")
    q, k = scores.inputs
    (q, of_q), (k, of_k) = _scalar_factor(q, m), _scalar_factor(k, m)
    scale *= of_q * of_k
    if not scores.attrs["trans_b"]:
        k = _swapped(k)
    causal = mask is not None and mask.is_const and _is_causal(mask.value, p.shape)
    operands = [q, k, v] + ([mask] if mask is not None and not causal else [])
    if rank == 3:
        operands = [ops.make("reshape", i, shape=(1,) * (4 - i.type.rank) + i.shape, origin=i.origin) for i in operands]
    try:
        result = _make(m, "attention", *operands, scale=scale, causal=causal)
    except ShapeError as e:
        return Declined(str(e))
    if not math.isfinite(scale):
        return Declined("the scale is not finite")
    return result if rank == 4 else _make(m, "reshape", result, shape=m.root.shape)


# ------------------------------------------------------------------------------------ movement


@rule(op("concat", where=lambda n: n.inputs[0].op == "slice" and n.type.rank == 4 and len(n.inputs) > 1))
def space_to_depth(m: Match) -> Node | Declined | None:
    """The concatenation of all phases of a strided slicing is one transpose between two reshapes.

    YOLO models call it focus: x[:, :, i::s, j::s] for all i, j, joined along the channels.
    """
    parts = m.root.inputs
    x = parts[0].inputs[0]
    if any(i.op != "slice" or i.inputs[0] is not x for i in parts):
        return None
    axis, step = m.root.attrs["axis"] % 4, parts[0].attrs["step"]
    strided = [a for a in range(4) if step[a] > 1]
    if axis in strided or not strided or len(parts) != math.prod(step) or any(s < 1 for s in step):
        return None
    if any(i.attrs["step"] != step or any(size * s != d for size, s, d in zip(i.shape, step, x.shape)) for i in parts):
        return None
    phases = [tuple(i.attrs["start"][a] for a in strided) for i in parts]
    if any(i.attrs["start"][a] for i in parts for a in range(4) if a not in strided):
        return None
    for order in _orders(len(strided)):
        # `order` lists the strided axes, the slowest phase first.
        steps = [step[strided[o]] for o in order]
        positions = [np.unravel_index(n, steps) for n in range(len(parts))]
        if [tuple(int(p[order.index(o)]) for o in range(len(strided))) for p in positions] == phases:
            break
    else:
        return Declined("the phases are not in the order of a transposition")
    # [.., d, ..] -> [.., d / s, s, ..]: split[a] is where axis a begins in the split tensor.
    shape: list[int] = []
    split = []
    for a, d in enumerate(x.shape):
        split.append(len(shape))
        shape += [d // step[a], step[a]] if a in strided else [d]
    perm = list(split)
    perm[axis:axis] = [split[strided[o]] + 1 for o in order]
    y = ops.make("reshape", x, shape=tuple(shape), origin=m.root.origin)
    y = ops.make("transpose", y, perm=tuple(perm), origin=m.root.origin)
    return _make(m, "reshape", y, shape=m.root.shape)


def _orders(n: int) -> list[tuple[int, ...]]:
    return [(0,)] if n == 1 else [(0, 1), (1, 0)] if n == 2 else []


RULES: list[Rule] = [slice_of_slice, group_norm_by_instance, *SOFTMAX, *ACTIVATIONS, log_softmax, square, positive_axis,
                     matmul_by_constant, scaled_dot_product, space_to_depth]


@dataclass(frozen=True, slots=True)
class RecognisePatterns:
    """`norms`: whether to look for normalizations. They run over trailing axes only, so before the
    layout is settled a decomposed one is better left to move with it."""

    norms: bool = True


@pass_("recognise-patterns", exact=True, options=RecognisePatterns)
def recognise_patterns(graph: Graph, options: RecognisePatterns) -> Graph:
    """Activations, softmax, normalizations, attention and matrix products under their own names."""
    return rewrite(graph, [*NORMS, norm_scale, norm_shift, *RULES] if options.norms else RULES)
