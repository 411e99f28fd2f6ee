"""Operators that onnxruntime's optimiser writes into float models: several standard ones each."""

from __future__ import annotations

from collections.abc import Sequence

from skive.frontend.onnx.rows.contractions import gemm, matmul
from skive.frontend.onnx.rows.quantization import MICROSOFT
from skive.frontend.onnx.rows.windows import convolve
from skive.frontend.onnx.table import Call, Unsupported, onnx_op
from skive.ir import Node


def activated(c: Call, x: Node, numbers: Sequence[float]) -> Node:
    """`x` behind the activation that the attribute of `c` names, with these parameters."""
    name = c.attr("activation", "")
    plain = {"Relu": "relu", "Tanh": "tanh", "Sigmoid": "sigmoid"}
    if name in ("", *plain):
        return c.make(plain[name], x) if name else x
    if name == "LeakyRelu":
        return c.make("leaky_relu", x, alpha=numbers[0] if numbers else 0.01)
    if name == "Clip" and len(numbers) == 2:
        return c.make("clip", x, lo=numbers[0], hi=numbers[1])
    if name == "HardSigmoid" and len(numbers) == 2:
        return c.make("hard_sigmoid", x, alpha=numbers[0], beta=numbers[1])
    raise Unsupported(f"{c.op_type} with the activation {name} of {len(numbers)} parameters")


@onnx_op("FusedConv", domain=MICROSOFT)
def fused_conv(c: Call) -> Node:
    y = convolve(c, c[0], c[1], c.get(2))
    if c.has(3):
        y = c.make("add", y, c[3])
    return activated(c, y, [float(v) for v in c.attr("activation_params", [])])


@onnx_op("FusedGemm", domain=MICROSOFT)
def fused_gemm(c: Call) -> Node:
    names = [n for n in ("activation_alpha", "activation_beta") if n in c.attrs]
    return activated(c, gemm(c), [float(c.attr(n)) for n in names])


@onnx_op("FusedMatMul", domain=MICROSOFT)
def fused_matmul(c: Call) -> Node:
    if c.attr("transBatchA", 0) or c.attr("transBatchB", 0):
        raise Unsupported("FusedMatMul with transBatchA or transBatchB")

    def operand(i: int, flag: str) -> Node:
        rank = c[i].type.rank
        return c.transpose(c[i], (*range(rank - 2), rank - 1, rank - 2)) if c.attr(flag, 0) and rank > 1 else c[i]

    y = matmul(c, operand(0, "transA"), operand(1, "transB"))
    alpha = float(c.attr("alpha", 1.0))
    return y if alpha == 1.0 else c.make("mul", y, alpha)


@onnx_op("Gelu", "BiasGelu", domain=MICROSOFT)
def gelu(c: Call) -> Node:
    return c.make("gelu", c.make("add", c[0], c[1]) if c.op_type == "BiasGelu" else c[0])


@onnx_op("FastGelu", domain=MICROSOFT)
def fast_gelu(c: Call) -> Node:
    return c.make("gelu_tanh", c.make("add", c[0], c[1]) if c.has(1) else c[0])


@onnx_op("QuickGelu", domain=MICROSOFT)
def quick_gelu(c: Call) -> Node:
    return c.make("mul", c[0], c.make("sigmoid", c.make("mul", c[0], float(c.attr("alpha", 1.702)))))


@onnx_op("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", domain=MICROSOFT)
def skip_layer_normalization(c: Call) -> list[Node | None]:
    """The normalised sum of input, skip and bias, and as the fourth result the sum itself."""
    if c.wants(1) or c.wants(2):
        raise Unsupported(f"{c.op_type} whose mean or deviation is used")
    op, beta, bias = ("layer_norm", 3, 4) if c.op_type == "SkipLayerNormalization" else ("rms_norm", None, 3)
    total = c.make("add", c[0], c[1])
    if c.has(bias):
        total = c.make("add", total, c[bias])
    affine = [c[2], *([c[beta]] if beta is not None and c.has(beta) else [])]
    eps = float(c.attr("epsilon", 1e-12))
    return [c.make(op, total, *affine, axis=total.type.rank - 1, eps=eps), None, None, total]
