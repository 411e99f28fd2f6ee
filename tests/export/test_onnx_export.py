"""Exported models: valid ONNX that onnxruntime computes as it computes the source, without needless transposes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from quantized_models import BODIES, float_model, quantized, samples

import skive
from skive import ops, reference
from skive.errors import InvalidModelError, ShapeError, UnsupportedOpError
from skive.export.onnx import ROWS, export_onnx
from skive.frontend.onnx import import_onnx
from skive.ir import Graph, Node, constant
from skive.passes import canonical, fuse_elementwise, integer_arithmetic
from skive.types import DType

ort = pytest.importorskip("onnxruntime")

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
MODELS = sorted((DATA / "models").glob("*.onnx"))
# Operations without a row: sources, what the writer takes apart or follows itself, what lowering alone makes, and what
# ONNX lacks.
NO_ROW = {"input", "const", "map", "transpose", "bit_cast", "cumprod", "integer_softmax", "integer_layer_norm",
          "log2_fixed", "piecewise", "choose", "copy", "sample", "batch"}


def session(model: onnx.ModelProto | Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def run(model: onnx.ModelProto, *inputs: np.ndarray) -> list[np.ndarray]:
    onnx.checker.check_model(model, full_check=True)
    engine = session(model)
    return engine.run(None, dict(zip([i.name for i in engine.get_inputs()], inputs, strict=True)))


def simple(source: onnx.ModelProto | Path, **shapes: tuple[int, ...]) -> Graph:
    return canonical(import_onnx(source, input_shapes=shapes), check="never")[0]


def operators(model: onnx.ModelProto) -> Counter[str]:
    return Counter(n.op_type for n in model.graph.node)


def check_operation(*inputs: Node, op: str, **attrs: object) -> None:
    """The exported operation gives what the table's reference gives, on inputs and on their channels-first twins."""
    graph = Graph("one", tuple(i for i in inputs if i.op == "input"), (ops.make(op, *inputs, **attrs),), ("y",))
    rng = np.random.default_rng(0)
    values = [rng.random(i.shape).astype(np.float32) + 0.25 if i.dtype.is_float else
              rng.integers(0, 2 if i.dtype is DType.bool else 20, i.shape).astype(i.dtype.numpy) for i in graph.inputs]
    (got,), (want,) = run(export_onnx(graph), *values), reference.evaluate_graph(graph, values)
    assert got.dtype == want.dtype and got.shape == want.shape
    # A weight of attention is 255 e^x in 16-bit fixed point here and rounded from float32 in ONNX: one may lie a level
    # beside, which is what a value weighs against a sum of 255 and more.
    level = attrs["factor"] * 20 / 255 if op == "quantized_attention" else 0  # type: ignore[operator]
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6 + level)
    assert (got != want).mean() <= 0.2 or not level


def value(name: str, *shape: int, dtype: DType = DType.f32) -> Node:
    return ops.make("input", shape=shape, dtype=dtype, label=name)


def test_every_operation_has_a_row_or_a_reason() -> None:
    assert set(ROWS) | NO_ROW == set(ops.OPS) and not set(ROWS) & NO_ROW


# Element types that onnxruntime has kernels for, by what the table lets the operation take.
FIRST = (DType.f32, DType.bool, DType.u32)


@pytest.mark.parametrize("name", sorted(n for n, o in ops.OPS.items() if o.kind == "elementwise" and n in ROWS
                                        and "quantize" not in n))
def test_elementwise(name: str) -> None:
    arity = ops.op_of(name).operands[0]
    required = {"lo": 0.5, "hi": 1.0, "to": DType.i32}
    attrs = {k: required[k] for k, v in ops.op_of(name).attrs.items() if v is ops.REQUIRED}
    for dtype in FIRST:
        kinds = [DType.bool, dtype, dtype] if name == "where" else [dtype] * arity
        operands = [value(f"x{i}", 2, 3, dtype=k) for i, k in enumerate(kinds)]
        try:
            ops.make(name, *operands, **attrs)
        except ShapeError:
            continue
        check_operation(*operands, op=name, **attrs)
        return
    raise AssertionError(f"{name} was not tried")


X = value("x", 1, 6, 8, 4)
RNG = np.random.default_rng(1)


def weights(*shape: int) -> Node:
    return constant(RNG.standard_normal(shape).astype(np.float32))


@pytest.mark.parametrize("case", [
    ("conv2d", (X, weights(6, 3, 2, 4), weights(6)), {"pad": (1, 0, 2, 1), "stride": (2, 1), "dilation": (1, 2)}),
    ("conv2d", (X, weights(8, 3, 3, 1), weights(8)), {"groups": 4}),
    ("conv_transpose2d", (X, weights(5, 3, 2, 4), weights(5)),
     {"pad": (1, 0, 0, 1), "stride": (2, 2), "out_pad": (1, 0)}),
    ("conv_transpose2d", (X, weights(6, 2, 2, 2)), {"groups": 2, "stride": (2, 2)}),
    ("conv_transpose2d", (X, ops.make("dequantize", constant(RNG.integers(-9, 9, (6, 2, 2, 2)).astype(np.int8)),
                                      constant(RNG.random((6, 1, 1, 1)).astype(np.float32)), constant(np.int8(0)))),
     {"groups": 2, "stride": (2, 2)}),
    ("max_pool2d", (X,), {"kernel": (3, 2), "pad": (1, 0, 1, 1), "stride": (2, 1)}),
    ("avg_pool2d", (X,), {"kernel": (3, 3), "pad": (1, 1, 1, 1), "count_pad": False}),
    ("avg_pool2d", (X,), {"kernel": (3, 3), "pad": (1, 1, 1, 1), "count_pad": True}),
    ("linear", (X, weights(3, 4), weights(3)), {}),
    ("matmul", (value("a", 2, 5, 3), value("b", 2, 4, 5)), {"trans_a": True, "trans_b": True}),
    ("attention", (value("q", 1, 2, 5, 4), value("k", 1, 2, 5, 4), value("v", 1, 2, 5, 3)),
     {"scale": 0.5, "causal": True}),
    ("attention", (value("q", 1, 5, 2, 4), value("k", 1, 7, 2, 4), value("v", 1, 7, 2, 3)),
     {"scale": 0.5, "token_major": True}),
    ("attention", (value("q", 1, 5, 2, 4), value("k", 1, 7, 2, 4), value("v", 1, 7, 2, 3)),
     {"scale": 0.5, "token_major": True, "levels": 255}),
    ("quantized_attention", tuple(value(n, 1, 5, 2, 4, dtype=DType.u8) for n in "qkv"),
     {"scale": 0.02, "factor": 0.3, "q_zero": 9, "k_zero": 7, "v_zero": 11, "token_major": True}),
    ("quantized_attention", tuple(value(n, 1, 2, 5, 4, dtype=DType.u8) for n in "qkv"),
     {"scale": 0.02, "factor": 0.9, "causal": True, "to": DType.u8, "y_zero": 3}),
    ("layer_norm", (X, weights(4), weights(4)), {}),
    ("rms_norm", (X, weights(8, 4)), {"axis": -2}),
    ("l2_norm", (X,), {"axis": -2, "least": 1.5}),
    ("l2_norm", (X,), {}),
    ("group_norm", (X, weights(4), weights(4)), {"groups": 2}),
    ("group_norm", (X, weights(4)), {"groups": 1}),
    ("group_norm", (X, weights(4)), {"groups": 4, "eps": 1e-3}),
    ("group_norm", (value("s", 2, 9, 6), weights(6), weights(6)), {"groups": 3}),
    ("softmax", (X,), {"axis": 2}),
    ("reduce_mean", (X,), {"axes": (1, 2), "keep": True}),
    ("reduce_max", (X,), {"axes": (0, 3), "keep": False}),
    ("argmax", (X,), {"axis": 3, "keep": False}),
    ("cumsum", (X,), {"axis": 1, "exclusive": True, "reverse": True}),
    ("topk_values", (X,), {"k": 2}),
    ("topk_indices", (X,), {"k": 2}),
    ("slice", (X,), {"start": (0, 5, 1, 0), "size": (1, 3, 4, 4), "step": (1, -2, 2, 1)}),
    ("pad", (X,), {"before": (0, 1, 0, 2), "after": (0, 0, 3, 0), "value": 0.5}),
    ("pad", (X,), {"before": (0, 1, 2, 0), "after": (0, 2, 0, 1), "mode": "reflect"}),
    ("gru", (value("s", 5, 2, 3), weights(12, 3), weights(12, 4), weights(2, 12), weights(2, 4)),
     {"reset_after": True}),
    ("gru_steps", (value("s", 5, 2, 12), weights(12, 4), weights(4), weights(2, 4)), {}),
    ("sum_pool2d", (value("u", 1, 6, 8, 4, dtype=DType.u8),), {"kernel": (3, 3), "pad": (1, 1, 1, 1), "zero": 7}),
    ("conv2d", (value("u", 1, 6, 8, 4, dtype=DType.u8), constant(np.arange(-36, 36, dtype=np.int8).reshape(2, 3, 3, 4)),
                constant(np.array([5, -9], np.int32))), {"zero": 3, "pad": (1, 1, 1, 1)}),
    ("linear", (value("u", 3, 4, dtype=DType.u8), constant(np.arange(-4, 4, dtype=np.int8).reshape(2, 4))),
     {"zero": 3}),
    ("matmul", (value("a", 2, 3, 4, dtype=DType.u8), value("b", 2, 4, 5, dtype=DType.u8)), {"a_zero": 3, "b_zero": 9}),
    ("requantize", (value("i", 3, 4, dtype=DType.i32), constant(np.float32([0.5, 1.25, 3, 7])),
                    constant(np.uint8(5))), {"to": DType.u8}),
    ("lookup", (value("u", 1, 6, 8, 4, dtype=DType.u8), constant(np.arange(0, 512, 2, dtype=np.int16))), {}),
    ("lookup", (value("i", 3, 4, dtype=DType.i8), constant(np.arange(256, dtype=np.uint8)[::-1].copy())), {}),
    ("requantize_fixed", (value("i", 3, 4, dtype=DType.i32), constant(np.int32(-77)), constant(np.int32(4)),
                          constant(np.int8(5))), {"to": DType.i8}),
], ids=lambda c: c[0])
def test_operation(case: tuple[str, tuple[Node, ...], dict[str, object]]) -> None:
    name, operands, attrs = case
    check_operation(*operands, op=name, **attrs)
    x = operands[0]
    if x.type.rank == 4:  # as an importer leaves it: the operand exists channels first
        other = ops.make("input", shape=tuple(x.shape[i] for i in (0, 3, 1, 2)), dtype=x.dtype, label=x.name)
        moved = ops.make("transpose", other, perm=(0, 2, 3, 1))
        node = ops.make(name, moved, *operands[1:], **attrs)
        inputs = (other, *(i for i in operands[1:] if i.op == "input"))
        graph = Graph("one", inputs, (node,), ("y",))
        rng = np.random.default_rng(0)
        values = [rng.random(i.shape).astype(np.float32) if i.dtype.is_float else
                  rng.integers(0, 20, i.shape).astype(i.dtype.numpy) for i in inputs]
        np.testing.assert_allclose(run(export_onnx(graph), *values)[0], reference.evaluate_graph(graph, values)[0],
                                   rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", BODIES)
def test_float_round_trip(name: str) -> None:
    source = float_model(name)
    graph = simple(source)
    model = export_onnx(graph)
    assert not operators(model)["Transpose"]
    fused = export_onnx(fuse_elementwise(graph))
    for x in samples(2, 3):
        want = session(source).run(None, {"x": x})[0]
        for m in (model, fused):
            np.testing.assert_allclose(run(m, x)[0], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("signed", [False, True], ids=["u8", "i8"])
@pytest.mark.parametrize("operators_", [False, True], ids=["qdq", "qoperator"])
@pytest.mark.parametrize("name", BODIES)
def test_quantized_round_trip(name: str, operators_: bool, signed: bool) -> None:
    """The same integers in onnxruntime as from the source, in QDQ form and with its sums as integers."""
    source = quantized(name, operators=operators_, signed=signed, per_channel=True)
    graph = simple(source)
    forms = [export_onnx(graph), export_onnx(integer_arithmetic(graph))]
    assert not any(operators(m)["Transpose"] for m in forms)
    last = import_onnx(source).outputs[0]
    step = 1.01 * float(last.inputs[1].value) if name in ("softmax", "average_pool", "add", "mul") else 0.0
    for x in samples(2, 3):
        want = session(source).run(None, {"x": x})[0]
        for m in forms:
            assert np.abs(run(m, x)[0] - want).max() <= step


def check_model(path: Path) -> None:
    engine = session(path)
    free = iter((96, 128))
    shapes = {p.name: tuple(d if isinstance(d, int) else 1 if i == 0 else next(free) for i, d in enumerate(p.shape))
              for p in engine.get_inputs()}
    rng = np.random.default_rng(0)
    inputs = {name: rng.random(shape, np.float32) for name, shape in shapes.items()}
    model = export_onnx(simple(path, **shapes))
    for got, want in zip(run(model, *inputs.values()), engine.run(None, inputs), strict=True):
        assert np.abs(got - want).max() <= 1e-6 * np.ptp(want)


SMALL = ("ad_autoencoder", "ic_resnet8", "kws_dscnn", "mnist_cnn", "resnet20_cifar10", "sr_espcn_x2", "sr_fsrcnn_x2",
         "vww_mobilenetv1_025")


@pytest.mark.parametrize("path", [pytest.param(p, id=p.stem, marks=[] if p.stem in SMALL else [pytest.mark.slow])
                                  for p in MODELS])
def test_real_model(path: Path) -> None:
    check_model(path)


def test_open_batch() -> None:
    """The batch stays symbolic where samples are independent of its size in the written graph, too."""
    source = float_model("network")
    source.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "N"
    source.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "N"
    graph = canonical(import_onnx(source, batch_max=8), check="never")[0]
    model = export_onnx(graph)
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    x = np.concatenate(samples(3, 2))
    np.testing.assert_allclose(run(model, x)[0], session(source).run(None, {"x": x})[0], rtol=1e-5, atol=1e-5)

    mixed = value("x", 1, 6)
    turned = ops.make("reshape", ops.make("transpose", mixed, perm=(1, 0)), shape=(1, 6))
    fixed = export_onnx(Graph("g", (mixed,), (turned,), ("y",), batch_max=8))
    assert fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1


@pytest.mark.parametrize("batch_max", [None, 4])
@pytest.mark.parametrize("size", [(18, 16), (19, 25), (5, 3)])
def test_resize_between_quantized_layers(size: tuple[int, int], batch_max: int | None, tmp_path: Path) -> None:
    """ONNX Runtime loads a Resize that it moves between integers, and its sizes fit every batch."""
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((4, 4, 1, 1)).astype(np.float32)
    nodes = [onnx.helper.make_node("Conv", ["x", "w"], ["a"]),
             onnx.helper.make_node("Resize", ["a", "", "", "sizes"], ["b"], mode="linear", axes=[2, 3],
                                   coordinate_transformation_mode="align_corners"),
             onnx.helper.make_node("Conv", ["b", "w"], ["c"]),  # behind which comes one more, so that it takes integers
             onnx.helper.make_node("Relu", ["c"], ["d"]), onnx.helper.make_node("Conv", ["d", "w"], ["y"])]
    batch = "N" if batch_max else 1
    graph = onnx.helper.make_graph(
        nodes, "resize", [onnx.helper.make_tensor_value_info("x", 1, [batch, 4, 9, 8])],
        [onnx.helper.make_tensor_value_info("y", 1, [batch, 4, *size])],
        [onnx.numpy_helper.from_array(weights, "w"), onnx.numpy_helper.from_array(np.asarray(size, np.int64), "sizes")])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 19)], ir_version=9)
    module = skive.compile(model, batch_max=batch_max, export_onnx=tmp_path / "q.onnx",
                           quantize=skive.Quantize(calibration=rng.standard_normal((8, 4, 9, 8)).astype(np.float32)))
    x = rng.standard_normal((batch_max or 1, 4, 9, 8)).astype(np.float32)
    got, want = run(onnx.load(tmp_path / "q.onnx"), x)[0], module(x)
    assert got.shape == want.shape and np.abs(got - want).max() < 1e-5 * np.abs(want).max()


def test_written_file(tmp_path: Path) -> None:
    graph = simple(float_model("network"))
    export_onnx(graph, tmp_path / "m.onnx")
    x = samples(1, 0)[0]
    np.testing.assert_array_equal(session(tmp_path / "m.onnx").run(None, {"x": x})[0], run(export_onnx(graph), x)[0])


@pytest.mark.parametrize("opset", [18, 19, 20, 21, 22, 23])
def test_opsets(opset: int) -> None:
    x = value("x", 2, 6)
    y = ops.make("rms_norm", ops.make("gelu", x), constant(np.ones(6, np.float32)))
    graph = Graph("g", (x,), (y,), ("y",))
    inputs = [np.random.default_rng(0).standard_normal((2, 6)).astype(np.float32)]
    model = export_onnx(graph, opset=opset)
    assert model.opset_import[0].version == opset
    np.testing.assert_allclose(run(model, *inputs)[0], reference.evaluate_graph(graph, inputs)[0], rtol=1e-5, atol=1e-6)


def test_sixteen_bits_need_opset_21() -> None:
    x = value("x", 2, 6)
    q = ops.make("quantize", x, constant(np.float32(2**-8)), constant(np.int16(0)), to=DType.i16)
    graph = Graph("g", (x,), (ops.make("dequantize", q, constant(np.float32(2**-8)), constant(np.int16(0))),), ("y",))
    inputs = [np.random.default_rng(0).standard_normal((2, 6)).astype(np.float32)]
    model = export_onnx(graph)
    assert model.opset_import[0].version == 21
    np.testing.assert_array_equal(run(model, *inputs)[0], reference.evaluate_graph(graph, inputs)[0])
    with pytest.raises(UnsupportedOpError, match="opset 21"):
        export_onnx(graph, opset=20)
    with pytest.raises(InvalidModelError, match="opset 7"):
        export_onnx(graph, opset=7)


@pytest.mark.parametrize(("op", "attrs"), [
    ("clip", {"lo": -5.0, "hi": 300.0}), ("relu", {}), ("min", {}), ("max", {}), ("concat", {"axis": 3}),
    ("max_pool2d", {"kernel": (3, 3), "pad": (1, 1, 1, 1)}), ("reduce_max", {"axes": (1, 2)}),
    ("pad", {"before": (0, 1, 0, 2), "after": (0, 0, 3, 0), "value": -7}),
    ("pad", {"before": (0, 1, 2, 0), "after": (0, 2, 0, 1), "mode": "reflect"}),
], ids=lambda v: v if isinstance(v, str) else "")
def test_sixteen_bits_pass_every_operation(op: str, attrs: dict[str, object]) -> None:
    """Also those that ONNX or onnxruntime has for other integers only."""
    a, b = (value(n, 1, 6, 8, 4, dtype=DType.i16) for n in "ab")
    operands = (a, b) if op in ("min", "max", "concat") else (a,)
    graph = Graph("g", operands, (ops.make(op, *operands, **attrs),), ("y",))
    rng = np.random.default_rng(0)
    values = [rng.integers(-32768, 32768, i.shape).astype(np.int16) for i in operands]
    np.testing.assert_array_equal(run(export_onnx(graph), *values)[0], reference.evaluate_graph(graph, values)[0])


def test_every_node_without_an_equivalent_is_named() -> None:
    x = ops.make("input", shape=(4,), dtype=DType.i32, label="x")
    y = ops.make("shift_left", x, x, origin="layer1")
    z = ops.make("cumprod", y, axis=0, origin="layer2")
    with pytest.raises(UnsupportedOpError) as e:
        export_onnx(Graph("g", (x,), (z,), ("z",)))
    assert [p[0] for p in e.value.problems] == ["layer1", "layer2"]


def test_outputs_keep_their_names() -> None:
    """One value under two names, an input that is an output, a constant that is one."""
    x = value("x", 2)
    y = ops.make("relu", x)
    graph = Graph("g", (x,), (y, y, x, constant(np.float32([1, 2]))), ("a", "b", "c", "d"))
    values = [np.array([-1, 2], np.float32)]
    model = export_onnx(graph)
    assert [o.name for o in model.graph.output] == ["a", "b", "c", "d"]
    for got, want in zip(run(model, *values), reference.evaluate_graph(graph, values), strict=True):
        np.testing.assert_array_equal(got, want)


def test_a_compiled_module_can_be_exported(tmp_path: Path) -> None:
    x = value("x", 1, 12)
    w = constant(np.random.default_rng(0).standard_normal((5, 12)).astype(np.float32))
    graph = Graph("g", (x,), (ops.make("linear", x, w),), ("y",))
    data = np.random.default_rng(1).standard_normal((8, 1, 12)).astype(np.float32)
    module = skive.compile(graph, quantize=skive.Quantize("int8", calibration=iter(data)))
    module.export_onnx(tmp_path / "net.onnx")
    model = onnx.load(tmp_path / "net.onnx")
    assert {"QuantizeLinear", "DequantizeLinear"} <= {n.op_type for n in model.graph.node}
    np.testing.assert_allclose(run(model, data[0])[0], module(data[0]), atol=1e-6)
    with pytest.raises(InvalidModelError, match="was loaded"):
        skive.load(module.folder).export_onnx(tmp_path / "again.onnx")


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_recurrences_on_bytes(name: str) -> None:
    """ONNX's states are not rounded: the exported layer is close, not equal."""
    gates = 4 if name == "lstm" else 3
    pre = value("pre", 6, 2, gates * 8)
    r = constant(RNG.integers(-127, 128, (gates * 8, 8)).astype(np.int8))
    scale = constant(RNG.uniform(0.002, 0.004, gates * 8).astype(np.float32))
    states = [weights(2, 8) for _ in range(gates - 2)] if gates == 4 else [weights(8), weights(2, 8)]
    h = ops.make(f"quantized_{name}", pre, r, scale, *states)
    if name == "lstm":
        h = ops.make("slice", h, start=(0, 0, 0, 0), size=(6, 1, 2, 8), step=(1, 1, 1, 1))
    graph = Graph("one", (pre,), (h,), ("y",))
    x = RNG.standard_normal(pre.shape).astype(np.float32)
    (got,), (want,) = run(export_onnx(graph), x), reference.evaluate_graph(graph, [x])
    assert np.abs(got - want).max() < 0.02 * np.abs(want).max()
