"""Model files that are damaged, hostile or of another kind: one clear line, never a traceback."""

from __future__ import annotations

import io
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from skive.errors import InvalidModelError, ShapeError, SkiveError, UnsupportedOpError
from skive.frontend import open_model
from skive.frontend.onnx import import_onnx, model_sha256


def small_model() -> ModelProto:
    """relu(x w + b) with x [2, 3]."""
    weights = [numpy_helper.from_array(np.arange(12, dtype=np.float32).reshape(3, 4), "w"),
               numpy_helper.from_array(np.ones(4, np.float32), "b")]
    nodes = [helper.make_node("MatMul", ["x", "w"], ["m"], "product"),
             helper.make_node("Add", ["m", "b"], ["s"], "sum"), helper.make_node("Relu", ["s"], ["y"], "rectified")]
    graph = helper.make_graph(nodes, "small", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3])],
                              [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 4])], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def refused(model: ModelProto | Path, error: type[SkiveError], *words: str) -> None:
    with pytest.raises(error) as e:
        import_onnx(model)
    assert "\n" not in str(e.value)
    for word in words:
        assert word in str(e.value)


def pickled() -> bytes:
    return pickle.dumps({"weights": [1, 2]})


def zipped() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        z.writestr("archive/data.pkl", pickled())
    return out.getvalue()


@pytest.mark.parametrize(("content", "word"), [
    (b"", "empty"), (b"hello, world", "not an ONNX model"), (pickled(), "pickle"), (zipped(), "zip"),
    (small_model().SerializeToString()[:60], "ONNX"), (b"\x08\x08", "no graph")])
def test_not_a_model(tmp_path: Path, content: bytes, word: str) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    refused(path, InvalidModelError, word)


def test_no_file(tmp_path: Path) -> None:
    refused(tmp_path / "none.onnx", InvalidModelError, "no such file")
    refused(tmp_path, InvalidModelError, "not a file")


def duplicate_name(m: ModelProto) -> None:
    m.graph.node[1].output[0] = "m"


def reversed_order(m: ModelProto) -> None:
    nodes = list(m.graph.node)[::-1]
    del m.graph.node[:]
    m.graph.node.extend(nodes)


def cycle(m: ModelProto) -> None:
    m.graph.node[0].input[0] = "y"


def missing_initialiser(m: ModelProto) -> None:
    del m.graph.initializer[0]


def wrong_size(m: ModelProto) -> None:
    m.graph.initializer[0].dims[0] = 5


def unknown_domain(m: ModelProto) -> None:
    m.graph.node[0].domain = "com.example"


def new_opset(m: ModelProto) -> None:
    m.opset_import[0].version = 29


def new_ir(m: ModelProto) -> None:
    m.ir_version = 99


def two_opsets(m: ModelProto) -> None:
    m.opset_import.add().version = 18


def other_type(m: ModelProto) -> None:
    m.graph.output[0].type.tensor_type.elem_type = TensorProto.INT64


def missing_attribute(m: ModelProto) -> None:
    m.graph.node[2].op_type = "Cast"


@pytest.mark.parametrize(("change", "words"), [
    (duplicate_name, ("produced twice", "'m'")), (reversed_order, ("order", "cycle")), (cycle, ("cycle", "product")),
    (missing_initialiser, ("'w'", "missing")), (wrong_size, ("w", "20", "12")),
    (unknown_domain, ("com.example", "product")), (new_opset, ("29", "28")), (new_ir, ("99",)),
    (two_opsets, ("twice",)), (other_type, ("'y'", "int64")), (missing_attribute, ("rectified", "to"))])
def test_unsound(change: Callable[[ModelProto], None], words: tuple[str, ...]) -> None:
    model = small_model()
    change(model)
    refused(model, InvalidModelError, *words)


@pytest.mark.parametrize("dims", [(-3, 4), (2**40, 2**40), (2**62, 4)])
def test_impossible_weights(dims: tuple[int, int]) -> None:
    model = small_model()
    model.graph.initializer[0].dims[:] = dims
    refused(model, ShapeError, "w")


def test_huge_input() -> None:
    model = small_model()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2**50
    refused(model, ShapeError, "2^40")


def test_operands_do_not_fit() -> None:
    model = small_model()
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 7
    refused(model, ShapeError, "product")


def nested(depth: int) -> ModelProto:
    """An If inside an If inside ..."""
    body = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "inner", [],
                             [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])])
    for _ in range(depth):
        node = helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body)
        body = helper.make_graph([node], "outer", [], [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])])
        if body.ByteSize() > 1 << 20:
            break
    body.input.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, [1]))
    body.initializer.append(numpy_helper.from_array(np.array(True), "c"))
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_more_examples_than_inputs() -> None:
    with pytest.raises(ShapeError, match="2 example_inputs are given; the inputs of the model are x"):
        open_model(small_model(), example_inputs=(np.zeros((2, 3)), np.zeros(4)))


def test_nesting() -> None:
    assert import_onnx(nested(3)).outputs[0].op == "input"


def test_deep_nesting() -> None:
    inner = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [],
                              [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])])
    for _ in range(28):  # Loop has one body: the file grows by a constant a level
        node = helper.make_node("Loop", ["n", "", "x"], ["y"], body=inner)
        inner = helper.make_graph([node], "g", [], [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])])
    inner.input.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, [1]))
    inner.initializer.append(numpy_helper.from_array(np.array(1), "n"))
    model = helper.make_model(inner, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    refused(model, InvalidModelError, "deep")


def recursive() -> ModelProto:
    """A function that calls itself."""
    function = helper.make_function("own", "F", ["a"], ["b"], [helper.make_node("F", ["a"], ["b"], domain="own")],
                                    [helper.make_opsetid("own", 1)])
    graph = helper.make_graph([helper.make_node("F", ["x"], ["y"], "call", domain="own")], "g",
                              [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
                              [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])])
    return helper.make_model(graph, functions=[function], ir_version=8,
                             opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("own", 1)])


def test_recursion() -> None:
    refused(recursive(), InvalidModelError, "deep")


def test_endless_loop() -> None:
    nodes = [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Relu", ["a"], ["b"])]
    body = helper.make_graph(nodes, "body",
                             [helper.make_tensor_value_info("i", TensorProto.INT64, []),
                              helper.make_tensor_value_info("go", TensorProto.BOOL, []),
                              helper.make_tensor_value_info("a", TensorProto.FLOAT, [1])],
                             [helper.make_tensor_value_info("on", TensorProto.BOOL, []),
                              helper.make_tensor_value_info("b", TensorProto.FLOAT, [1])])
    graph = helper.make_graph([helper.make_node("Loop", ["", "", "x"], ["y"], "forever", body=body)], "g",
                              [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
                              [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    with pytest.raises(UnsupportedOpError, match="forever"):
        import_onnx(model)


# ------------------------------------------------------------------------------------ external data


def with_external(tmp_path: Path, **entries: str) -> Path:
    """`small_model` whose weights `w` lie in another file."""
    model = small_model()
    w = model.graph.initializer[0]
    (tmp_path / "w.bin").write_bytes(w.raw_data)
    w.ClearField("raw_data")
    w.data_location = TensorProto.EXTERNAL
    for key, value in ({"location": "w.bin"} | entries).items():
        w.external_data.add(key=key, value=value)
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def test_external_data(tmp_path: Path) -> None:
    external = import_onnx(with_external(tmp_path, offset="0", length="48"))
    plain = import_onnx(small_model())
    weights = [[n.value for n in g.nodes if n.is_const and n.type.rank == 2] for g in (external, plain)]
    np.testing.assert_array_equal(weights[0], weights[1])


@pytest.mark.parametrize("entries", [
    {"location": "/etc/hostname"}, {"location": "../w.bin"}, {"location": "a/../../w.bin"}, {"location": "C:\\w.bin"},
    {"location": "..\\w.bin"}, {"location": ""}, {"location": "none.bin"}, {"location": "."}, {"location": "w\0.bin"},
    {"offset": "8"}, {"offset": "-4"}, {"length": "40"}, {"length": "99999999999"}, {"offset": "four"}])
def test_unsafe_external_data(tmp_path: Path, entries: dict[str, str]) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "w.bin").write_bytes(bytes(48))
    refused(with_external(tmp_path / "model", **entries), InvalidModelError, "w")


def test_link_out_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "secret").write_bytes(bytes(48))
    (tmp_path / "model" / "link.bin").symlink_to(tmp_path / "secret")
    refused(with_external(tmp_path / "model", location="link.bin"), InvalidModelError, "link")


def test_external_data_of_a_model_in_memory(tmp_path: Path) -> None:
    refused(onnx.load(with_external(tmp_path), load_external_data=False), InvalidModelError, "path")


def test_hash_covers_external_data(tmp_path: Path) -> None:
    path = with_external(tmp_path)
    before = model_sha256(path)
    assert before == model_sha256(path)
    data = bytearray((tmp_path / "w.bin").read_bytes())
    data[5] ^= 1
    (tmp_path / "w.bin").write_bytes(data)
    assert model_sha256(path) != before


# --------------------------------------------------------------------------------------- mutations


def mutated(data: bytes, rng: random.Random) -> bytes:
    """`data` with one to four small damages."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        i = rng.randrange(len(out))
        kind = rng.randrange(4)
        if kind == 0:
            out[i] = rng.randrange(256)
        elif kind == 1:
            del out[i:i + rng.randint(1, 8)]
        elif kind == 2:
            out[i:i] = rng.randbytes(rng.randint(1, 8))
        else:
            out[i:i + 1] = b"\xff" * 9 + b"\x01"  # the largest number protobuf can store
        if not out:
            return b"\0"
    return bytes(out)


@pytest.mark.parametrize("seed", range(10))
def test_mutations(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    path = tmp_path / "model.onnx"
    originals = [small_model().SerializeToString(), nested(2).SerializeToString(), recursive().SerializeToString()]
    for _ in range(60):
        path.write_bytes(mutated(rng.choice(originals), rng))
        try:
            import_onnx(path)
        except UnsupportedOpError as e:
            assert e.problems
        except SkiveError as e:
            assert "\n" not in str(e)
