"""What the ONNX importer makes of a sound model: names, constants, problems, shapes, batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from skive.errors import ShapeError, UnsupportedOpError
from skive.frontend.onnx import import_onnx
from skive.frontend.onnx.rows import resize
from skive.frontend.onnx.table import ROWS
from skive.reference import evaluate_graph

ELEM = {"float32": TensorProto.FLOAT, "int32": TensorProto.INT32, "int64": TensorProto.INT64, "bool": TensorProto.BOOL}


def model_of(nodes: Sequence[NodeProto], inputs: Mapping[str, tuple[Sequence[int | str], str]], outputs: Sequence[str],
             weights: Mapping[str, Any] = {}) -> ModelProto:  # noqa: B006
    """A model of opset 18 with float32 outputs; inputs are name -> (shape, element type)."""
    infos = [helper.make_tensor_value_info(n, ELEM[t], list(s)) for n, (s, t) in inputs.items()]
    results = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs]
    constants = [numpy_helper.from_array(np.asarray(v), n) for n, v in weights.items()]
    graph = helper.make_graph(list(nodes), "g", infos, results, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def test_names() -> None:
    nodes = [helper.make_node("Relu", ["x"], ["a"], "first"), helper.make_node("Exp", ["a"], ["y"])]
    graph = import_onnx(model_of(nodes, {"x": ((2, 3), "float32")}, ["y"]))
    x, relu, exp = graph.nodes
    assert (x.op, x.name) == ("input", "x")
    assert (relu.op, relu.name, relu.origin) == ("relu", "a", "first")
    assert (exp.op, exp.name, exp.origin) == ("exp", "y", "Exp:y")
    assert graph.output_names == ("y",)


def test_shape_arithmetic_disappears() -> None:
    nodes = [helper.make_node("Shape", ["x"], ["s"]), helper.make_node("Gather", ["s", "zero"], ["n"]),
             helper.make_node("Unsqueeze", ["n", "axes"], ["n1"]),
             helper.make_node("Concat", ["n1", "rest"], ["to"], axis=0),
             helper.make_node("Reshape", ["x", "to"], ["y"])]
    graph = import_onnx(model_of(nodes, {"x": ((2, 3, 4), "float32")}, ["y"],
                                 {"zero": np.int64(0), "axes": np.array([0]), "rest": np.array([-1])}))
    assert [n.op for n in graph.nodes] == ["input", "reshape"]
    assert graph.outputs[0].shape == (2, 12)


def test_large_constants_stay_nodes() -> None:
    nodes = [helper.make_node("ConstantOfShape", ["shape"], ["big"]), helper.make_node("Add", ["x", "big"], ["y"])]
    graph = import_onnx(model_of(nodes, {"x": ((1,), "float32")}, ["y"], {"shape": np.array([1 << 16, 1 << 16])}))
    assert "expand" in {n.op for n in graph.nodes}


def test_every_problem_is_reported() -> None:
    nodes = [helper.make_node("NonZero", ["x"], ["nz"], "where"),
             helper.make_node("Cast", ["nz"], ["f"], "convert", to=1),
             helper.make_node("Reshape", ["x", "s"], ["v"], "view"),
             helper.make_node("RandomNormalLike", ["x"], ["r"], "noise"), helper.make_node("Det", ["q"], ["d"], "det"),
             helper.make_node("Nonsense", ["r"], ["z"], "nonsense"), helper.make_node("Relu", ["x"], ["y"], "fine")]
    model = model_of(nodes, {"x": ((2, 3), "float32"), "q": ((9, 9), "float32"), "s": ((1,), "int64")},
                     ["y", "f", "z", "d", "v"])
    with pytest.raises(UnsupportedOpError) as e:
        import_onnx(model)
    assert [p[0] for p in e.value.problems] == ["where", "view", "noise", "det", "nonsense"]
    assert e.value.fixable == ("s",)
    assert all(word in str(e.value) for word in ("NonZero", "RandomNormalLike", "Nonsense", "fixed_inputs"))


@pytest.mark.parametrize(("attrs", "says"), [
    ({"clip": 0.5}, "LSTM with clip=0.5; export the layer without it"),
    ({"input_forget": 1}, "LSTM with input_forget; export"),
    ({"activations": ["HardSigmoid", "Tanh", "Tanh"]}, "activation hardsigmoid; it can be identity, relu, sigmoid"),
])
def test_recurrent_layers_that_are_refused_say_why(attrs: dict[str, Any], says: str) -> None:
    node = helper.make_node("LSTM", ["x", "w", "r"], ["y"], "cell", hidden_size=2, **attrs)
    weights = {"w": np.zeros((1, 8, 3), np.float32), "r": np.zeros((1, 8, 2), np.float32)}
    with pytest.raises(UnsupportedOpError, match=f"cell: .*{says}"):
        import_onnx(model_of([node], {"x": ((4, 1, 3), "float32")}, ["y"], weights))


def test_an_input_that_decides_a_shape() -> None:
    nodes = [helper.make_node("Reshape", ["x", "shape"], ["y"], "view")]
    model = model_of(nodes, {"x": ((2, 3), "float32"), "shape": ((1,), "int64")}, ["y"])
    with pytest.raises(UnsupportedOpError, match="fixed_inputs") as e:
        import_onnx(model)
    assert e.value.fixable == ("shape",)
    graph = import_onnx(model, fixed_inputs={"shape": np.array([6])})
    assert [n.name for n in graph.inputs] == ["x"]
    assert graph.outputs[0].shape == (6,)


def test_fixed_inputs_are_checked() -> None:
    model = model_of([helper.make_node("Relu", ["x"], ["y"])], {"x": ((2,), "float32")}, ["y"])
    with pytest.raises(ShapeError, match="'z'"):
        import_onnx(model, fixed_inputs={"z": np.zeros(2)})
    with pytest.raises(UnsupportedOpError, match="float64"):
        import_onnx(model, fixed_inputs={"x": np.zeros(2)})


def test_symbolic_dimensions() -> None:
    model = model_of([helper.make_node("Relu", ["x"], ["y"])], {"x": (("N", 3, "H"), "float32")}, ["y"])
    with pytest.raises(ShapeError, match="--input x=1x3.*--input N=1"):
        import_onnx(model)
    assert import_onnx(model, input_shapes={"x": (2, 3, 5)}).outputs[0].shape == (2, 3, 5)
    assert import_onnx(model, input_shapes={"N": (4,), "H": (6,)}).outputs[0].shape == (4, 3, 6)
    with pytest.raises(ShapeError, match="does not fit"):
        import_onnx(model, input_shapes={"x": (2, 4, 5)})


def branch(op: str) -> onnx.GraphProto:
    return helper.make_graph([helper.make_node(op, ["x"], ["r"])], op, [],
                             [helper.make_tensor_value_info("r", TensorProto.FLOAT, None)])


def test_constant_condition() -> None:
    node = helper.make_node("If", ["c"], ["y"], "choice", then_branch=branch("Relu"), else_branch=branch("Exp"))
    for value, op in ((True, "relu"), (False, "exp")):
        graph = import_onnx(model_of([node], {"x": ((2,), "float32")}, ["y"], {"c": np.array(value)}))
        assert graph.outputs[0].op == op


def test_open_condition() -> None:
    inputs = {"x": ((2,), "float32"), "c": ((1,), "bool")}
    node = helper.make_node("If", ["c"], ["y"], "choice", then_branch=branch("Relu"), else_branch=branch("Exp"))
    graph = import_onnx(model_of([node], inputs, ["y"]))
    x = np.array([-1, 2], np.float32)
    for value, want in ((True, np.maximum(x, 0)), (False, np.exp(x))):
        np.testing.assert_allclose(evaluate_graph(graph, {"x": x, "c": np.array([value])})[0], want, rtol=1e-6)
    node = helper.make_node("If", ["c"], ["y"], "choice", then_branch=branch("Relu"), else_branch=branch("Size"))
    with pytest.raises(UnsupportedOpError, match="choice") as e:
        import_onnx(model_of([node], inputs, ["y"]))
    assert not e.value.fixable


def test_model_functions() -> None:
    function = helper.make_function("own", "Scaled", ["a"], ["b"],
                                    [helper.make_node("Constant", [], ["k"], value_float=3.0),
                                     helper.make_node("LeakyRelu", ["a"], ["l"]),
                                     helper.make_node("Mul", ["l", "k"], ["b"])],
                                    [helper.make_opsetid("", 18)], ["alpha"])
    function.node[1].attribute.add(name="alpha", ref_attr_name="alpha", type=onnx.AttributeProto.FLOAT)
    call = helper.make_node("Scaled", ["x"], ["y"], "call", domain="own", alpha=0.5)
    model = model_of([call], {"x": ((2,), "float32")}, ["y"])
    model.functions.append(function)
    model.opset_import.append(helper.make_opsetid("own", 1))
    x = np.array([-2, 2], np.float32)
    np.testing.assert_allclose(evaluate_graph(import_onnx(model), [x])[0], [-3, 6])


def test_negative_pads_and_conv3d() -> None:
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(2, 3, 5, 6, 7)).astype(np.float32), rng.normal(size=(4, 3, 2, 3, 2)).astype(np.float32)
    node = helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 0, 1, 0, 1, 1], strides=[2, 1, 2], dilations=[2, 1, 1])
    got = evaluate_graph(import_onnx(model_of([node], {"x": (x.shape, "float32")}, ["y"], {"w": w})), [x])[0]
    padded = np.pad(x, [(0, 0), (0, 0), (1, 0), (0, 1), (1, 1)])
    want = np.zeros_like(got)
    for o in np.ndindex(*got.shape[2:]):
        d, h, v = o[0] * 2, o[1], o[2] * 2
        window = padded[:, :, d:d + 3:2, h:h + 3, v:v + 2]
        want[(slice(None), slice(None), *o)] = np.einsum("ncdhw,ocdhw->no", window, w)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_table_spells_onnx_names() -> None:
    known = {(s.domain, s.name) for s in onnx.defs.get_all_schemas_with_history()}
    newer = {("", "SwiGLU"), ("", "TensorScatter"), ("", "Swish"), ("", "RMSNormalization"), ("", "CumProd")}
    own = ("com.microsoft", "skive")  # operators of onnxruntime, and of our PyTorch front end: in no schema
    assert {r for r in ROWS if r[0] not in own} - newer <= known


# -------------------------------------------------------------------------------------------- batch

N = {"x": (("N", 3, 4), "float32")}
IMAGE = {"x": (("N", 3, 8, 8), "float32")}
W = np.ones((2, 3, 3, 3), np.float32)


@pytest.mark.parametrize(("nodes", "inputs", "weights"), [
    ([helper.make_node("Conv", ["x", "w"], ["c"]), helper.make_node("GlobalAveragePool", ["c"], ["p"]),
      helper.make_node("Flatten", ["p"], ["y"])], IMAGE, {"w": W}),
    ([helper.make_node("Transpose", ["x"], ["t"], perm=[1, 0, 2]), helper.make_node("Softmax", ["t"], ["s"]),
      helper.make_node("Transpose", ["s"], ["y"], perm=[1, 0, 2])], N, {}),
    ([helper.make_node("Reshape", ["x", "rows"], ["r"]), helper.make_node("MatMul", ["r", "m"], ["p"]),
      helper.make_node("Reshape", ["p", "back"], ["y"])], N,
     {"rows": np.array([-1, 4]), "m": np.eye(4, dtype=np.float32), "back": np.array([-1, 3, 4])}),
    ([helper.make_node("Transpose", ["x"], ["t"], perm=[1, 0, 2]), helper.make_node("Reshape", ["t", "rows"], ["r"]),
      helper.make_node("Gemm", ["r", "m", "b"], ["p"]), helper.make_node("Relu", ["p"], ["q"]),
      helper.make_node("Reshape", ["q", "back"], ["u"]),
      helper.make_node("Transpose", ["u"], ["y"], perm=[1, 0, 2])], N,
     {"rows": np.array([-1, 4]), "m": np.arange(20, dtype=np.float32).reshape(4, 5), "b": np.ones(5, np.float32),
      "back": np.array([3, -1, 5])}),
    ([helper.make_node("Reshape", ["x", "split"], ["s"]), helper.make_node("Transpose", ["s"], ["t"], perm=[1, 0, 2]),
      helper.make_node("Reshape", ["t", "rows"], ["r"]), helper.make_node("MatMul", ["r", "m"], ["p"]),
      helper.make_node("Reshape", ["p", "back"], ["u"]),
      helper.make_node("Transpose", ["u"], ["y"], perm=[1, 0, 2])], N,
     {"split": np.array([-1, 2, 3]), "rows": np.array([-1, 6]), "m": np.eye(6, dtype=np.float32),
      "back": np.array([2, -1, 6])}),  # [heads, tokens, width] of all samples, as in nn.MultiheadAttention
    ([helper.make_node("Transpose", ["x"], ["t"], perm=[1, 0, 2]), helper.make_node("GatherND", ["t", "at"], ["g"]),
      helper.make_node("Neg", ["g"], ["n"]), helper.make_node("ScatterND", ["t", "to", "n"], ["u"]),
      helper.make_node("Transpose", ["u"], ["y"], perm=[1, 0, 2])], N,
     {"at": np.array([[2], [0]]), "to": np.array([[0], [1]])}),
    ([helper.make_node("Shape", ["x"], ["s"]), helper.make_node("ConstantOfShape", ["s"], ["z"]),
      helper.make_node("Concat", ["x", "z"], ["y"], axis=1)], N, {}),
    ([helper.make_node("Transpose", ["x"], ["t"], perm=[0, 2, 1]),
      helper.make_node("MatMul", ["x", "t"], ["y"])], N, {}),
])
def test_separable(nodes: list[NodeProto], inputs: dict[str, Any], weights: dict[str, Any]) -> None:
    model = model_of(nodes, inputs, ["y"], weights)
    graph = import_onnx(model, batch_max=5)
    assert graph.batch_max == 5 and graph.inputs[0].shape[0] == 1
    shape = (3, *graph.inputs[0].shape[1:])
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    whole = evaluate_graph(import_onnx(model, input_shapes={"x": shape}), [x])[0]
    samples = np.concatenate([evaluate_graph(graph, [x[i:i + 1]])[0] for i in range(3)])
    np.testing.assert_allclose(whole, samples, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("nodes", "weights"), [
    ([helper.make_node("ReduceMean", ["x", "axes"], ["m"]), helper.make_node("Sub", ["x", "m"], ["y"])],
     {"axes": np.array([0])}),
    ([helper.make_node("Softmax", ["x"], ["y"], axis=0)], {}),
    ([helper.make_node("Reshape", ["x", "to"], ["y"])], {"to": np.array([3, -1, 4])}),
    ([helper.make_node("Concat", ["x", "x"], ["y"], axis=0)], {}),
    ([helper.make_node("CumSum", ["x", "axis"], ["y"])], {"axis": np.array(0)}),
    ([helper.make_node("Transpose", ["x"], ["y"], perm=[1, 0, 2])], {}),
    ([helper.make_node("Shape", ["x"], ["s"], end=1), helper.make_node("Cast", ["s"], ["n"], to=1),
      helper.make_node("Div", ["x", "n"], ["y"])], {}),
    ([helper.make_node("Slice", ["x", "zero", "end", "zero", "back"], ["y"])],
     {"zero": np.array([0]), "end": np.array([-99]), "back": np.array([-1])}),
    ([helper.make_node("Gather", ["x", "first"], ["y"])], {"first": np.array([0])}),
    ([helper.make_node("Reshape", ["x", "to"], ["y"])], {"to": np.array([1, 3, 4])}),
    ([helper.make_node("Transpose", ["x"], ["t"], perm=[1, 0, 2]), helper.make_node("Reshape", ["t", "rows"], ["r"]),
      helper.make_node("MatMul", ["r", "m"], ["p"]), helper.make_node("Reshape", ["p", "to"], ["y"])],
     {"rows": np.array([-1, 4]), "m": np.eye(4, dtype=np.float32), "to": np.array([-1, 3, 4])}),
    ([helper.make_node("Transpose", ["x"], ["t"], perm=[1, 0, 2]), helper.make_node("Reshape", ["t", "rows"], ["r"]),
      helper.make_node("Softmax", ["r"], ["p"], axis=0), helper.make_node("Reshape", ["p", "to"], ["u"]),
      helper.make_node("Transpose", ["u"], ["y"], perm=[1, 0, 2])],
     {"rows": np.array([-1, 4]), "to": np.array([3, -1, 4])}),
    ([helper.make_node("GatherND", ["x", "first"], ["y"])], {"first": np.array([[0]])}),
    ([helper.make_node("Neg", ["x"], ["n"]), helper.make_node("GatherND", ["n", "first"], ["g"]),
      helper.make_node("ScatterND", ["x", "first", "g"], ["y"])], {"first": np.array([[0]])}),
    ([helper.make_node("Transpose", ["x"], ["t"], perm=[1, 0, 2]), helper.make_node("Reshape", ["t", "to"], ["y"])],
     {"to": np.array([-1, 3, 4])}),
])
def test_not_separable(nodes: list[NodeProto], weights: dict[str, Any]) -> None:
    model = model_of(nodes, N, ["y"], weights)
    with pytest.raises(ShapeError, match="batch|sample"):
        import_onnx(model, batch_max=4)


def test_inputs_without_a_batch() -> None:
    nodes = [helper.make_node("Mul", ["x", "k"], ["y"])]
    model = model_of(nodes, {**N, "k": ((4,), "float32")}, ["y"])
    with pytest.raises(ShapeError, match="'k'"):
        import_onnx(model, batch_max=4)
    assert import_onnx(model, batch_max=4, fixed_inputs={"k": np.ones(4, np.float32)}).batch_max == 4


@pytest.mark.parametrize("attrs", [
    {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
    {"mode": "linear", "coordinate_transformation_mode": "align_corners"}, {"mode": "linear", "antialias": 1},
    {"mode": "cubic", "exclude_outside": 1}], ids=lambda a: "-".join(map(str, a.values())))
@pytest.mark.parametrize("axes", [(2, 3), (1, 2), (3,)])
def test_resampling_of_images(attrs: dict[str, Any], axes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """One resize2d on either layout, equal to the products and gathers that it stands for."""
    x = np.random.default_rng(1).normal(size=(2, 6, 5, 7)).astype(np.float32)
    scales = np.array([1.8, 0.6][:len(axes)], np.float32)
    model = model_of([helper.make_node("Resize", ["x", "", "scales"], ["y"], axes=axes, **attrs)],
                     {"x": (x.shape, "float32")}, ["y"], {"scales": scales})
    graph = import_onnx(model)
    used = [n.op for n in graph.nodes if n.op not in ("input", "const")]
    assert used == (["resize2d"] if axes == (1, 2) else ["transpose", "resize2d", "transpose"])
    monkeypatch.setattr(resize, "MAX_TAPS", 0)
    composed = import_onnx(model)
    assert "resize2d" not in {n.op for n in composed.nodes}
    np.testing.assert_allclose(evaluate_graph(graph, [x])[0], evaluate_graph(composed, [x])[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("size", "scale", "attrs", "places"), [
    (10, 0.7, {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}, [0, 1, 2, 4, 5, 7, 8]),
    (7, 0.6, {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}, [0, 1, 3, 5]),
    (10, 0.3, {}, [1, 4, 8])], ids=["length", "place", "half pixel"])
def test_nearest_neighbours_are_rounded_in_float32(size: int, scale: float, attrs: dict[str, Any], places: list[int],
                                                   ) -> None:
    """10 * 0.7 and 3 / 0.6 are integers in float32, which decides a length or a place; expected: onnxruntime."""
    model = model_of([helper.make_node("Resize", ["x", "", "scales"], ["y"], mode="nearest", **attrs)],
                     {"x": ((1, 1, 1, size), "float32")}, ["y"], {"scales": np.array([1, 1, 1, scale], np.float32)})
    y = evaluate_graph(import_onnx(model), [np.arange(size, dtype=np.float32).reshape(1, 1, 1, size)])[0]
    assert y.reshape(-1).tolist() == places


def test_corners_of_models_that_pytorch_wrote() -> None:
    """Their lengths are integers, where ONNX divides by 5 * 0.7 - 1."""
    model = model_of([helper.make_node("Resize", ["x", "", "scales"], ["y"], mode="linear",
                                       coordinate_transformation_mode="align_corners")],
                     {"x": ((1, 1, 1, 5), "float32")}, ["y"], {"scales": np.array([1, 1, 1, 0.7], np.float32)})
    x = np.arange(5, dtype=np.float32).reshape(1, 1, 1, 5)
    np.testing.assert_allclose(evaluate_graph(import_onnx(model), [x])[0].reshape(-1), [0, 1.6, 3.2], rtol=1e-6)
    model.producer_name = "pytorch"
    np.testing.assert_allclose(evaluate_graph(import_onnx(model), [x])[0].reshape(-1), [0, 2, 4], rtol=1e-6)


@pytest.mark.parametrize(("start", "end", "step", "taken"), [
    (-9, -99, -1, [0]), (-9, -99, -3, [0]), (-5, -99, -2, [0]), (-9, 2, -1, []), (9, -99, -2, [4, 2, 0]),
    (-9, 99, 2, [0, 2, 4]), (9, 99, 1, [])])
def test_slices_from_beyond_the_ends(start: int, end: int, step: int, taken: list[int]) -> None:
    """ONNX moves a start of a backward slice to the first element; expected: its rules and onnxruntime."""
    where = {"start": start, "end": end, "axis": 0, "step": step}
    model = model_of([helper.make_node("Slice", ["x", *where], ["y"])], {"x": ((5,), "float32")}, ["y"],
                     {k: np.array([v]) for k, v in where.items()})
    assert evaluate_graph(import_onnx(model), [np.arange(5, dtype=np.float32)])[0].tolist() == taken


@pytest.mark.parametrize("attrs", [{"auto_pad": "SAME_UPPER"}, {"auto_pad": "SAME_LOWER"}, {"output_shape": [6]}],
                         ids=str)
def test_strides_beyond_the_window_leave_empty_rows_behind(attrs: dict[str, Any]) -> None:
    model = model_of([helper.make_node("ConvTranspose", ["x", "w"], ["y"], strides=[3], **attrs)],
                     {"x": ((1, 1, 2), "float32")}, ["y"], {"w": np.ones((1, 1, 1), np.float32)})
    y = evaluate_graph(import_onnx(model), [np.array([[[1, 2]]], np.float32)])[0]
    assert y.reshape(-1).tolist() == [1, 0, 0, 2, 0, 0]


def test_shifts_of_64_bits_are_exact() -> None:
    """Constants are folded with all bits, those beyond float64 too."""
    node = helper.make_node("BitShift", ["a", "b"], ["y"], direction="RIGHT")
    weights = {"a": np.array([2**63 + 5, 7, 9], np.uint64), "b": np.array([1, 1, 64], np.uint64)}
    model = model_of([node], {}, ["y"], weights)
    model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.UINT64
    y = evaluate_graph(import_onnx(model), [])[0]
    assert y.tolist() == [2**62 + 2, 3, 0]


@pytest.mark.parametrize(("node", "inputs", "message"), [
    (helper.make_node("Softmax", ["x"], ["y"]), {"x": ((2, 3), "int64")}, "softmax is not defined for i64"),
    (helper.make_node("ScatterElements", ["x", "i", "u"], ["y"], axis=1),  # a third row, which the data do not have
     {"x": ((2, 3), "float32"), "i": ((3, 1), "int64"), "u": ((3, 1), "float32")}, "do not fit f32")])
def test_operands_that_no_kernel_is_for(node: NodeProto, inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        import_onnx(model_of([node], inputs, ["y"]))


def test_ragged_sequences_at_run_time() -> None:
    """Lengths that are an input give what the same lengths as a constant give."""
    rng = np.random.default_rng(2)
    weights = {"w": rng.normal(size=(2, 9, 3)), "r": rng.normal(size=(2, 9, 3))}
    weights = {k: v.astype(np.float32) for k, v in weights.items()}
    x, lengths = rng.normal(size=(4, 3, 3)).astype(np.float32), np.array([2, 4, 0], np.int32)
    node = helper.make_node("GRU", ["x", "w", "r", "", "n"], ["y", "h"], hidden_size=3, direction="bidirectional")
    inputs = {"x": (x.shape, "float32")}
    fixed = import_onnx(model_of([node], inputs, ["y", "h"], {**weights, "n": lengths}))
    open_ = import_onnx(model_of([node], {**inputs, "n": ((3,), "int32")}, ["y", "h"], weights))
    for want, got in zip(evaluate_graph(fixed, [x]), evaluate_graph(open_, [x, lengths]), strict=True):
        np.testing.assert_array_equal(got, want)
    assert not evaluate_graph(open_, [x, lengths])[0][2:, :, 0].any()
