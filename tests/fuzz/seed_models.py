"""Small ONNX models that together use every part of the format: what the file fuzzer mutates."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper

FLOAT = TensorProto.FLOAT


def value(name: str, *shape: int, elem: int = FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, elem, list(shape))


def weight(name: str, *shape: int) -> TensorProto:
    rng = np.random.default_rng(sum(map(ord, name)))
    return numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)


def ints(name: str, *values: int) -> TensorProto:
    return numpy_helper.from_array(np.array(values, np.int64), name)


def model(graph: onnx.GraphProto, opset: int = 17, **fields: object) -> ModelProto:
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8, **fields)


def convolutions() -> ModelProto:
    nodes = [
        helper.make_node(
            "Conv", ["x", "w0", "b0"], ["c0"], name="stem", kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[2, 2]
        ),
        helper.make_node("BatchNormalization", ["c0", "s", "t", "m", "v"], ["n0"], name="norm", epsilon=1e-5),
        helper.make_node("Relu", ["n0"], ["r0"], name="act"),
        helper.make_node("Conv", ["r0", "w1"], ["c1"], name="depthwise", group=4, pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["c1", "r0"], ["a0"], name="residual"),
        helper.make_node(
            "MaxPool", ["a0"], ["p0"], name="pool", kernel_shape=[2, 2], strides=[2, 2], auto_pad="SAME_UPPER"
        ),
        helper.make_node("GlobalAveragePool", ["p0"], ["g0"], name="mean"),
        helper.make_node("Flatten", ["g0"], ["f0"], name="flat", axis=1),
        helper.make_node("Gemm", ["f0", "w2", "b2"], ["y"], name="head", transB=1, alpha=1.0, beta=1.0),
    ]
    norm = [weight("s", 4), weight("t", 4), weight("m", 4), numpy_helper.from_array(np.ones(4, np.float32), "v")]
    weights = [
        weight("w0", 4, 3, 3, 3),
        weight("b0", 4),
        weight("w1", 4, 1, 3, 3),
        weight("w2", 5, 4),
        weight("b2", 5),
        *norm,
    ]
    return model(helper.make_graph(nodes, "convolutions", [value("x", 1, 3, 8, 8)], [value("y", 1, 5)], weights))


def shapes() -> ModelProto:
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"], name="shape"),
        helper.make_node("Gather", ["shape", "one"], ["n"], name="rows", axis=0),
        helper.make_node("Concat", ["n", "minus"], ["to"], name="to", axis=0),
        helper.make_node("Reshape", ["x", "to"], ["r"], name="reshape"),
        helper.make_node("Transpose", ["r"], ["t"], name="transpose", perm=[1, 0]),
        helper.make_node("Slice", ["t", "zero", "two", "zero", "one"], ["s"], name="slice"),
        helper.make_node("Pad", ["s", "pads"], ["p"], name="pad", mode="constant"),
        helper.make_node("Split", ["p", "split"], ["q0", "q1"], name="split", axis=0),
        helper.make_node("Concat", ["q1", "q0"], ["c"], name="join", axis=1),
        helper.make_node("ReduceSum", ["c", "one"], ["u"], name="sum", keepdims=0),
        helper.make_node("Resize", ["x4", "", "scales"], ["up"], name="resize", mode="linear"),
        helper.make_node("TopK", ["u", "one"], ["values", "indices"], name="topk", axis=0),
        helper.make_node("Expand", ["values", "wide"], ["y"], name="expand"),
    ]
    constants = [
        ints("one", 1),
        ints("zero", 0),
        ints("two", 2),
        ints("minus", -1),
        ints("pads", 1, 0, 1, 0),
        ints("split", 2, 2),
        ints("wide", 3, 1),
        numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "scales"),
    ]
    return model(
        helper.make_graph(
            nodes,
            "shapes",
            [value("x", 2, 3), value("x4", 1, 2, 3, 3)],
            [value("y", 3, 1), value("up", 1, 2, 6, 6)],
            constants,
        )
    )


def attention() -> ModelProto:
    nodes = [
        helper.make_node("LayerNormalization", ["x", "g", "b"], ["h"], name="norm", axis=-1, epsilon=1e-5),
        helper.make_node("MatMul", ["h", "wq"], ["q"], name="query"),
        helper.make_node("MatMul", ["h", "wk"], ["k"], name="key"),
        helper.make_node("Transpose", ["k"], ["kt"], name="turn", perm=[0, 2, 1]),
        helper.make_node("MatMul", ["q", "kt"], ["a"], name="scores"),
        helper.make_node("Softmax", ["a"], ["p"], name="softmax", axis=-1),
        helper.make_node("MatMul", ["p", "h"], ["o"], name="mix"),
        helper.make_node("Gelu", ["o"], ["e"], name="gelu"),
        helper.make_node("Einsum", ["e", "h"], ["z"], name="einsum", equation="bij,bkj->bik"),
        helper.make_node("Clip", ["z", "lo", ""], ["y"], name="clip"),
    ]
    weights = [
        weight("g", 8),
        weight("b", 8),
        weight("wq", 8, 8),
        weight("wk", 8, 8),
        numpy_helper.from_array(np.float32(0), "lo"),
    ]
    return model(helper.make_graph(nodes, "attention", [value("x", 1, 4, 8)], [value("y", 1, 4, 4)], weights), 20)


def control() -> ModelProto:
    then = helper.make_graph([helper.make_node("Add", ["x", "x"], ["then_out"])], "then", [], [value("then_out", 3)])
    other = helper.make_graph([helper.make_node("Neg", ["x"], ["else_out"])], "else", [], [value("else_out", 3)])
    body = helper.make_graph(
        [helper.make_node("Mul", ["state", "half"], ["next"]), helper.make_node("Identity", ["going"], ["going_out"])],
        "body",
        [value("i", elem=TensorProto.INT64), value("going", elem=TensorProto.BOOL), value("state", 3)],
        [value("going_out", elem=TensorProto.BOOL), value("next", 3), value("next", 3)],
    )
    nodes = [
        helper.make_node("If", ["yes"], ["chosen"], name="if", then_branch=then, else_branch=other),
        helper.make_node("Loop", ["trips", "yes", "chosen"], ["last", "all"], name="loop", body=body),
        helper.make_node("SequenceConstruct", ["last", "x"], ["seq"], name="sequence"),
        helper.make_node("SequenceAt", ["seq", "first"], ["item"], name="at"),
        helper.make_node("Twice", ["item"], ["doubled"], name="call", domain="local"),
        helper.make_node("Sum", ["doubled", "x"], ["y"], name="total"),
    ]
    function = helper.make_function(
        "local", "Twice", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])], [helper.make_opsetid("", 17)]
    )
    constants = [
        numpy_helper.from_array(np.array(True), "yes"),
        numpy_helper.from_array(np.array(3, np.int64), "trips"),
        numpy_helper.from_array(np.array(0, np.int64), "first"),
        numpy_helper.from_array(np.float32(0.5), "half"),
    ]
    graph = helper.make_graph(nodes, "control", [value("x", 3)], [value("y", 3), value("all", 3, 3)], constants)
    return helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("local", 1)],
        ir_version=8,
        functions=[function],
    )


def recurrent() -> ModelProto:
    nodes = [
        helper.make_node(
            "LSTM", ["x", "w", "r", "b"], ["all", "last", ""], name="lstm", hidden_size=4, direction="bidirectional"
        ),
        helper.make_node("Squeeze", ["last", "axes"], ["s"], name="squeeze"),
        helper.make_node("Gather", ["table", "ids"], ["e"], name="embedding"),
        helper.make_node("Cast", ["ids"], ["f"], name="cast", to=FLOAT),
        helper.make_node("Where", ["mask", "f", "f"], ["y"], name="where"),
    ]
    weights = [weight("w", 2, 16, 3), weight("r", 2, 16, 4), weight("b", 2, 32), weight("table", 6, 4), ints("axes", 1)]
    return model(
        helper.make_graph(
            nodes,
            "recurrent",
            [
                value("x", 5, 1, 3),
                value("ids", 1, 2, elem=TensorProto.INT64),
                value("mask", 1, 2, elem=TensorProto.BOOL),
            ],
            [value("s", 2, 4), value("e", 1, 2, 4), value("y", 1, 2)],
            weights,
        )
    )


def quantized() -> ModelProto:
    rng = np.random.default_rng(0)
    zero, scale = numpy_helper.from_array(np.uint8(3), "zero"), numpy_helper.from_array(np.float32(0.1), "scale")
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], name="quantize"),
        helper.make_node("MatMulInteger", ["q", "w", "zero"], ["i"], name="product"),
        helper.make_node("Cast", ["i"], ["f"], name="cast", to=FLOAT),
        helper.make_node("Mul", ["f", "scale"], ["y"], name="scale"),
    ]
    w = numpy_helper.from_array(rng.integers(-9, 9, (4, 3)).astype(np.int8), "w")
    return model(helper.make_graph(nodes, "quantized", [value("x", 2, 4)], [value("y", 2, 3)], [zero, scale, w]))


def external() -> ModelProto:
    """Two weights live in `weights.bin`, 64 bytes each, beside the model."""
    tensors = []
    for i, name in enumerate(("w0", "w1")):
        t = TensorProto(name=name, data_type=FLOAT, dims=[4, 4], data_location=TensorProto.EXTERNAL)
        for key, entry in {"location": "weights.bin", "offset": str(64 * i), "length": "64"}.items():
            t.external_data.add(key=key, value=entry)
        tensors.append(t)
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["h"], name="first"),
        helper.make_node("MatMul", ["h", "w1"], ["y"], name="second"),
    ]
    return model(helper.make_graph(nodes, "external", [value("x", 2, 4)], [value("y", 2, 4)], tensors))


EXTERNAL_BYTES = np.linspace(-1, 1, 32, dtype=np.float32).tobytes()
SEEDS = (convolutions, shapes, attention, control, recurrent, quantized, external)
