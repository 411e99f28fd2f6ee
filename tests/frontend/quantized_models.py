"""Small models that onnxruntime's quantizer writes, for the tests of quantized import and export."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, numpy_helper, parser

SHAPE = (1, 5, 10, 10)


def weights(rng: np.random.Generator, **shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    return {name: rng.standard_normal(shape).astype(np.float32) * np.float32(0.3) for name, shape in shapes.items()}


# name -> (type of the result, body, shapes of its weights). The input is x [1, 5, 10, 10]; a convolution stands
# before what onnxruntime does not quantize by itself.
CONV = "c = Conv<pads=[1,1,1,1]>(x, w, b)"
CONV_WEIGHTS = {"w": (5, 5, 3, 3), "b": (5,)}
BODIES: dict[str, tuple[str, str, dict[str, tuple[int, ...]]]] = {
    "conv": ("1,8,10,10", "y = Conv<pads=[1,1,1,1]>(x, w, b)", {"w": (8, 5, 3, 3), "b": (8,)}),
    "strided": ("1,8,5,5", "y = Conv<pads=[0,0,1,1],strides=[2,2]>(x, w, b)", {"w": (8, 5, 3, 3), "b": (8,)}),
    "depthwise": ("1,5,10,10", "y = Conv<pads=[1,1,1,1],group=5>(x, w, b)", {"w": (5, 1, 3, 3), "b": (5,)}),
    "relu": ("1,5,10,10", f"{CONV} y = Relu(c)", CONV_WEIGHTS),
    "clip": ("1,5,10,10", f"{CONV} lo = Constant<value_float=0.0>() hi = Constant<value_float=1.5>() "
                          "y = Clip(c, lo, hi)", CONV_WEIGHTS),
    "leaky_relu": ("1,5,10,10", f"{CONV} y = LeakyRelu<alpha=0.1>(c)", CONV_WEIGHTS),
    "sigmoid": ("1,5,10,10", f"{CONV} y = Sigmoid(c)", CONV_WEIGHTS),
    "softmax": ("1,5,10,10", f"{CONV} y = Softmax<axis=-1>(c)", CONV_WEIGHTS),
    "add": ("1,5,10,10", f"{CONV} y = Add(c, x)", CONV_WEIGHTS),
    "mul": ("1,5,10,10", f"{CONV} y = Mul(c, x)", CONV_WEIGHTS),
    "concat": ("1,10,10,10", f"{CONV} y = Concat<axis=1>(c, x)", CONV_WEIGHTS),
    "max_pool": ("1,5,5,5", f"{CONV} y = MaxPool<kernel_shape=[2,2],strides=[2,2]>(c)", CONV_WEIGHTS),
    "average_pool": ("1,5,10,10", f"{CONV} y = AveragePool<kernel_shape=[3,3],pads=[1,1,1,1]>(c)", CONV_WEIGHTS),
    "global_pool": ("1,5,1,1", f"{CONV} y = GlobalAveragePool(c)", CONV_WEIGHTS),
    "gemm": ("1,7", "f = Flatten(x) y = Gemm<transB=1>(f, w, b)", {"w": (7, 500), "b": (7,)}),
    "matmul": ("1,5,10,6", "y = MatMul(x, w)", {"w": (10, 6)}),
    "network": ("1,4", "a = Conv<pads=[1,1,1,1]>(x, w, b) r = Relu(a) d = Conv<pads=[1,1,1,1],group=8>(r, v, c) "
                       "e = Relu(d) s = Add(r, e) g = GlobalAveragePool(s) f = Flatten(g) "
                       "y = Gemm<transB=1>(f, u, k)",
                {"w": (8, 5, 3, 3), "b": (8,), "v": (8, 1, 3, 3), "c": (8,), "u": (4, 8), "k": (4,)}),
    "flattened": ("1,4", f"{CONV} r = Relu(c) f = Flatten(r) y = Gemm<transB=1>(f, u, k)",
                  {**CONV_WEIGHTS, "u": (4, 500), "k": (4,)}),
}


def float_model(name: str) -> ModelProto:
    """The model `name` of BODIES in float32."""
    shape, body, shapes = BODIES[name]
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {name} (float[1,5,10,10] x) => '
                               f"(float[{shape}] y) {{ {body} }}")
    values = weights(np.random.default_rng(len(name)), **shapes)
    model.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in values.items())
    for i, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{i}"
    return model


def samples(count: int, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(SHAPE).astype(np.float32) for _ in range(count)]


@contextlib.contextmanager
def no_warnings() -> Iterator[None]:
    """Without the advice of onnxruntime's quantizer, written to the root logger, to run another tool first."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)


def quantized(name: str, *, operators: bool, signed: bool, per_channel: bool) -> ModelProto:
    """What `quantize_static` makes of the model: QOperator or QDQ, activations i8 or u8, weights i8."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left: Iterator[np.ndarray] = iter(samples(8, 1))

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(({"x": v} for v in self.left), None)

    with tempfile.TemporaryDirectory() as folder, no_warnings():
        source, target = Path(folder) / "float.onnx", Path(folder) / "quantized.onnx"
        onnx.save(float_model(name), source)
        quantize_static(source, target, Reader(), per_channel=per_channel, weight_type=QuantType.QInt8,
                        quant_format=QuantFormat.QOperator if operators else QuantFormat.QDQ,
                        activation_type=QuantType.QInt8 if signed else QuantType.QUInt8)
        return onnx.load(target)
