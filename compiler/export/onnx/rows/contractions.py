"""Matrix products and attention."""

from __future__ import annotations

import numpy as np

from skive.export.onnx.writer import ELEM_TYPES, F32, Inexpressible, Order, Writer, has_blocks, integers, row, scalar
from skive.ir import Node
from skive.types import DType


def swapped(rank: int, swap: bool) -> Order:
    """The own order of a matrix, or the one with its last two axes exchanged."""
    own = tuple(range(rank))
    return (*own[:-2], rank - 1, rank - 2) if swap else own


@row("linear")
def linear(w: Writer, n: Node) -> None:
    x, weights, *bias = n.inputs
    if n.dtype is not x.dtype:
        y = w.emit("MatMulInteger", w.get(x), w.get(weights, (1, 0)), scalar(n.attrs["zero"], x.dtype))
        w.put(n, w.emit("Add", y, w.get(bias[0])) if bias else y)
    elif x.type.rank == 2:
        w.put(n, w.emit("Gemm", w.get(x), w.get(weights), w.get(bias[0]) if bias else "", transB=1))
    else:
        y = w.emit("MatMul", w.get(x), w.get(weights, (1, 0)))
        w.put(n, w.emit("Add", y, w.get(bias[0])) if bias else y)


@row("compressed_linear")
def compressed_linear(w: Writer, n: Node) -> None:
    """Weights by DequantizeLinear, the product in float32 whatever bits of the activations ours takes."""
    x, q, scale, zero, bias = n.inputs
    if not all(i.is_const for i in n.inputs[1:]):
        raise Inexpressible("compressed_linear with weights that are computed")
    if has_blocks(n):
        if w.opset < 21:
            raise Inexpressible("weights in blocks or of 4 bits need opset 21")
        values = [q.value, zero.value] if n.attrs["bits"] == 8 else [w.nibbles(q.value), w.nibbles(zero.value)]
        block = {"axis": 1, "block_size": n.attrs["group"]}
    else:
        values, block = [q.value, zero.value[:, 0]], {"axis": 0}
    scales = scale.value if "block_size" in block else scale.value[:, 0]
    weights = w.emit("DequantizeLinear", values[0], scales, values[1], **block)
    if x.type.rank == 2:
        w.put(n, w.emit("Gemm", w.get(x), weights, w.get(bias), transB=1))
        return
    y = w.emit("MatMul", w.get(x), w.emit("Transpose", weights, perm=(1, 0)))
    w.put(n, w.emit("Add", y, w.get(bias)))


@row("matmul")
def matmul(w: Writer, n: Node) -> None:
    a, b = n.inputs
    names = [w.get(a, swapped(a.type.rank, n.attrs["trans_a"])), w.get(b, swapped(b.type.rank, n.attrs["trans_b"]))]
    if n.dtype is a.dtype:
        w.put(n, w.emit("MatMul", *names))
        return
    zeros = [scalar(n.attrs["a_zero"], a.dtype), scalar(n.attrs["b_zero"], b.dtype)]
    w.put(n, w.emit("MatMulInteger", *names, *zeros))


@row("attention")
def attention(w: Writer, n: Node) -> None:
    heads = (0, 2, 1, 3) if n.attrs["token_major"] else (0, 1, 2, 3)
    q, k, v = n.inputs[:3]
    scores = w.emit("MatMul", w.get(q, heads), w.get(k, (heads[0], heads[1], heads[3], heads[2])))
    scores = w.emit("Mul", scores, scalar(n.attrs["scale"], n.dtype))
    if len(n.inputs) > 3:
        scores = w.emit("Add", scores, w.get(n.inputs[3]))
    if n.attrs["causal"]:
        hidden = np.triu(np.full((q.shape[heads[2]], k.shape[heads[2]]), -np.inf, n.dtype.numpy), 1)
        scores = w.emit("Add", scores, hidden)
    if not n.attrs["levels"]:
        w.put(n, w.emit("MatMul", w.emit("Softmax", scores, axis=-1), w.get(v, heads)), heads)
        return
    if n.attrs["levels"] != 255:
        raise Inexpressible(f"attention with weights of {n.attrs['levels']} levels")
    p = w.emit("DequantizeLinear", byte_weights(w, scores), scalar(1, F32), scalar(0, DType.u8))
    w.put(n, w.emit("Div", w.emit("MatMul", p, w.get(v, heads)), row_sums(w, p)), heads)


def byte_weights(w: Writer, scores: str) -> str:
    """255 exp(score - largest of its row), in bytes; from float32, so that one may be a level beside the artefact's."""
    e = w.emit("Exp", w.emit("Sub", scores, w.emit("ReduceMax", scores, integers(-1), keepdims=1)))
    return w.emit("QuantizeLinear", e, scalar(1 / 255, F32), scalar(0, DType.u8))


def row_sums(w: Writer, p: str) -> str:
    return w.emit("ReduceSum", p, integers(-1), keepdims=1)


@row("quantized_attention")
def quantized_attention(w: Writer, n: Node) -> None:
    heads = (0, 2, 1, 3) if n.attrs["token_major"] else (0, 1, 2, 3)
    q, k, v = n.inputs[:3]
    zeros = [scalar(n.attrs[z], DType.u8) for z in ("q_zero", "k_zero", "v_zero")]
    across = (heads[0], heads[1], heads[3], heads[2])
    sums = w.emit("MatMulInteger", w.get(q, heads), w.get(k, across), zeros[0], zeros[1])
    scores = w.emit("Mul", w.emit("Cast", sums, to=ELEM_TYPES[F32]), scalar(n.attrs["scale"], F32))
    if len(n.inputs) > 3:
        scores = w.emit("Add", scores, w.get(n.inputs[3]))
    if n.attrs["causal"]:
        hidden = np.triu(np.full((q.shape[heads[2]], k.shape[heads[2]]), -np.inf, np.float32), 1)
        scores = w.emit("Add", scores, hidden)
    p = byte_weights(w, scores)
    products = w.emit("MatMulInteger", p, w.get(v, heads), scalar(0, DType.u8), zeros[2])
    total = w.emit("Cast", products, to=ELEM_TYPES[F32])
    sum_ = row_sums(w, w.emit("DequantizeLinear", p, scalar(1, F32), scalar(0, DType.u8)))
    y = w.emit("Mul", total, w.emit("Div", scalar(n.attrs["factor"], F32), sum_))
    if n.dtype is not F32:
        y = w.emit("QuantizeLinear", y, scalar(1, F32), scalar(n.attrs["y_zero"], n.dtype))
    w.put(n, y, heads)
