"""Matrix products, Einsum and attention."""

from __future__ import annotations

import math

import numpy as np

from skive.errors import InvalidModelError
from skive.frontend.onnx.table import Call, Decline, is_known, is_quantized_constant, onnx_op
from skive.ir import Node
from skive.ops import broadcast_shapes
from skive.types import DType


def matmul(c: Call, a: Node, b: Node) -> Node:
    """numpy.matmul(a, b); a float32 product with a constant matrix becomes `linear`."""
    if a.type.rank == 0 or b.type.rank == 0:
        raise InvalidModelError("matrix product of a scalar")
    if is_known(b) and b.type.rank == 2 and not a.is_const and b.dtype is DType.f32:
        return c.make("linear", a, c.transpose(b, (1, 0)))
    rows = c.reshape(a, (1, *a.shape)) if a.type.rank == 1 else a
    columns = c.reshape(b, (*b.shape, 1)) if b.type.rank == 1 else b
    y = c.make("matmul", rows, columns)
    shape = list(y.shape)
    if b.type.rank == 1:
        del shape[-1]
    if a.type.rank == 1:
        del shape[-1 if b.type.rank == 1 else -2]
    return c.reshape(y, shape)


@onnx_op("MatMul")
def matmul_op(c: Call) -> Node:
    return matmul(c, c[0], c[1])


@onnx_op("Gemm")
def gemm_op(c: Call) -> Node:
    return gemm(c)


def gemm(c: Call) -> Node:
    """alpha a b + beta bias, as the operands and attributes of `c` say."""
    a, b, bias = c[0], c[1], c.get(2)
    alpha, beta = float(c.attr("alpha", 1.0)), float(c.attr("beta", 1.0))
    trans_a, trans_b = bool(c.attr("transA", 0)), bool(c.attr("transB", 0))
    if a.type.rank != 2 or b.type.rank != 2:
        raise InvalidModelError(f"Gemm of {a.type} and {b.type}")
    if bias is not None and beta != 1.0:
        bias = c.make("mul", bias, beta)
    if is_known(b) and b.dtype is DType.f32:
        w = b if trans_b else c.transpose(b, (1, 0))
        w = scaled(c, w, alpha)
        x = c.transpose(a, (1, 0)) if trans_a else a
        columns = w.shape[0]
        if bias is None:
            return c.make("linear", x, w)
        if bias.is_const and (bias.type.size == 1 or bias.shape in ((columns,), (1, columns))):
            return c.make("linear", x, w, c.lit(np.broadcast_to(bias.value.reshape(-1), (columns,))))
        if is_quantized_constant(bias) and bias.shape in ((columns,), (1, columns)):
            return c.make("linear", x, w, c.reshape(bias, (columns,)))
        return c.make("add", c.make("linear", x, w), bias)
    y = c.make("matmul", a, b, trans_a=trans_a, trans_b=trans_b)
    y = c.make("mul", y, alpha) if alpha != 1.0 else y
    return y if bias is None else c.make("add", y, bias)


def scaled(c: Call, w: Node, alpha: float) -> Node:
    """Weights times a number; of quantized ones the scales change."""
    if alpha == 1.0:
        return w
    if is_quantized_constant(w):
        q, scale, zero = w.inputs
        return c.make("dequantize", q, c.make("mul", scale, alpha), zero)
    return c.make("mul", w, alpha)


# ------------------------------------------------------------------------------------------- Einsum


@onnx_op("Einsum")
def einsum(c: Call) -> Node:
    """The equation, operand by operand: diagonals, sums, then one batched matrix product a pair."""
    operands = c.tensors
    equation = str(c.required("equation")).replace(" ", "")
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    if len(terms) != len(operands):
        raise InvalidModelError(f"equation {equation!r} for {len(operands)} operands")
    dots = max((x.type.rank - len(t.replace("...", "")) for t, x in zip(terms, operands) if "..." in t), default=0)
    names = [t.replace("...", "\0" * 1) for t in terms]
    # The axes of an ellipsis get names of their own, counted from the right.
    spelled = [list(n) if "\0" not in n else
               [*n[:n.index("\0")], *(chr(0x100 + k) for k in range(dots - (x.type.rank - len(n) + 1), dots)),
                *n[n.index("\0") + 1:]] for n, x in zip(names, operands)]
    letters = [letter for term in spelled for letter in term]
    if arrow:
        i = right.find("...")
        result = list(right) if i < 0 else [*right[:i], *(chr(0x100 + k) for k in range(dots)), *right[i + 3:]]
    else:
        result = [chr(0x100 + k) for k in range(dots)] + sorted(
            n for n in set(letters) if letters.count(n) == 1 and ord(n) < 0x100)
    if any(len(t) != x.type.rank for t, x in zip(spelled, operands)) or not set(result) <= set(letters):
        raise InvalidModelError(f"equation {equation!r} for {', '.join(str(x.type) for x in operands)}")
    current, axes = diagonal(c, operands[0], spelled[0])
    for k in range(1, len(operands)):
        other, other_axes = diagonal(c, operands[k], spelled[k])
        later = {n for term in spelled[k + 1:] for n in term} | set(result)
        current, axes = contract(c, current, axes, other, other_axes, later)
    current, axes = summed(c, current, axes, set(result))
    current = c.transpose(current, [axes.index(n) for n in result])
    return current


def diagonal(c: Call, x: Node, axes: list[str]) -> tuple[Node, list[str]]:
    """`x` with axes of the same name replaced by their diagonal."""
    axes = list(axes)
    while len(set(axes)) < len(axes):
        name = next(n for n in axes if axes.count(n) > 1)
        i = axes.index(name)
        j = axes.index(name, i + 1)
        n = x.shape[i]
        if x.shape[j] != n:
            raise InvalidModelError(f"a diagonal of {x.type}")
        perm = [k for k in range(x.type.rank) if k not in (i, j)] + [i, j]
        x = c.transpose(x, perm)
        flat = c.reshape(x, (*x.shape[:-2], n * n))
        x = c.slice(flat, flat.type.rank - 1, 0, n, n + 1)
        axes = [axes[k] for k in perm[:-1]]
    return x, axes


def summed(c: Call, x: Node, axes: list[str], keep: set[str]) -> tuple[Node, list[str]]:
    """`x` summed over the axes that nobody needs."""
    drop = tuple(i for i, n in enumerate(axes) if n not in keep)
    if drop:
        x = c.make("reduce_sum", x, axes=drop, keep=False)
    return x, [n for n in axes if n in keep]


def contract(c: Call, a: Node, a_axes: list[str], b: Node, b_axes: list[str],
             later: set[str]) -> tuple[Node, list[str]]:
    """The product of two tensors, summed over the common axes that are not needed later."""
    a, a_axes = summed(c, a, a_axes, later | set(b_axes))
    b, b_axes = summed(c, b, b_axes, later | set(a_axes))
    size = {n: max(d, e) for n, d, e in [(n, a.shape[a_axes.index(n)] if n in a_axes else 1,
                                          b.shape[b_axes.index(n)] if n in b_axes else 1) for n in a_axes + b_axes]}
    common = [n for n in a_axes if n in b_axes]
    batch, inner = [n for n in common if n in later], [n for n in common if n not in later]
    rows, columns = [n for n in a_axes if n not in common], [n for n in b_axes if n not in common]

    def arranged(x: Node, axes: list[str], order: list[list[str]]) -> Node:
        flat = [n for group in order for n in group]
        x = c.transpose(x, [axes.index(n) for n in flat])
        x = c.expand(x, [size[n] for n in flat])
        return c.reshape(x, [math.prod(size[n] for n in group) for group in order])

    if not inner and not rows and not columns:
        y = c.make("mul", arranged(a, a_axes, [[n] for n in batch]), arranged(b, b_axes, [[n] for n in batch]))
    else:
        y = c.make("matmul", arranged(a, a_axes, [batch, rows, inner]), arranged(b, b_axes, [batch, inner, columns]))
    axes = [*batch, *rows, *columns]
    return c.reshape(y, [size[n] for n in axes]), axes


# ---------------------------------------------------------------------------------------- Attention


@onnx_op("Attention")
def attention(c: Call) -> Node:
    """Scaled dot-product attention in its plain form; the function body does caches, caps and windows."""
    known = {"q_num_heads", "kv_num_heads", "scale", "is_causal", "softcap", "softmax_precision"}
    q, k, v = c[0], c[1], c[2]
    if (set(c.attrs) - known or c.attr("softcap", 0.0) or any(c.has(i) for i in range(4, 7))
            or any(c.wants(i) for i in range(1, 4)) or any(t.dtype is not DType.f32 for t in (q, k, v))):
        raise Decline("attention with more than queries, keys, values and a mask")
    flat = q.type.rank == 3
    if flat:
        queries, keys = int(c.required("q_num_heads")), int(c.required("kv_num_heads"))
        q, k, v = split_heads(c, q, queries), split_heads(c, k, keys), split_heads(c, v, keys)
    if any(t.type.rank != 4 for t in (q, k, v)) or k.shape[1] < 1 or q.shape[1] % k.shape[1]:
        raise InvalidModelError(f"attention of {q.type}, {k.type}, {v.type}")
    mask = c.get(3)
    full = (*q.shape[:3], k.shape[2])
    if mask is not None and not plain_mask(mask, full):
        raise Decline("a mask that may hide every key of a query")
    causal = bool(c.attr("is_causal", 0))
    if causal and q.shape[2] != k.shape[2]:
        raise Decline("causal attention of unequal lengths")
    k, v = (repeat_heads(c, t, q.shape[1] // t.shape[1]) for t in (k, v))
    scale = float(c.attr("scale", 0.0)) or 1.0 / math.sqrt(q.shape[3])
    y = c.make("attention", q, k, v, *([] if mask is None else [mask]), scale=scale, causal=causal)
    return c.reshape(c.transpose(y, (0, 2, 1, 3)), (y.shape[0], y.shape[2], y.shape[1] * y.shape[3])) if flat else y


def plain_mask(mask: Node, full: tuple[int, ...]) -> bool:
    """Whether a mask is a constant to be added that leaves every query at least one key."""
    return (mask.is_const and mask.dtype is DType.f32 and broadcast_shapes(mask.shape, full) == full
            and bool(np.isfinite(mask.value).any(-1).all()))


def split_heads(c: Call, x: Node, heads: int) -> Node:
    """[N, L, heads D] as [N, heads, L, D]."""
    if x.type.rank != 3 or heads < 1 or x.shape[2] % heads:
        raise InvalidModelError(f"{heads} heads of {x.type}")
    return c.transpose(c.reshape(x, (*x.shape[:2], heads, x.shape[2] // heads)), (0, 2, 1, 3))


def repeat_heads(c: Call, x: Node, times: int) -> Node:
    """Every head of [N, heads, L, D] `times` in a row: grouped queries share keys and values."""
    n, heads, length, depth = x.shape
    wide = c.expand(c.reshape(x, (n, heads, 1, length, depth)), (n, heads, times, length, depth))
    return c.reshape(wide, (n, heads * times, length, depth))
