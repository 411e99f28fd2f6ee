"""The text form: exact round trips, names that cannot break out, and errors with line numbers."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from skive import ops
from skive.errors import InvalidModelError, SkiveError
from skive.ir import Graph, Node, constant, content_hash
from skive.text import constants_of, load_text, parse_graph, print_graph, save_text
from skive.types import DType, Quant, Sparsity, TensorType
from skive.verify import verify

SAMPLE = '''graph @kws(%x: f32[1,4,4,1]) {
  %w = const [1.0,2.0,3.0,4.0] : f32[1,2,2,1]
  %0 = conv2d %x, %w {stride=[2,2], pad=[0,1,0,1]} : f32[1,2,3,1]  ; conv1/Conv2D
  %1 = clip %0 {lo=0.0, hi=inf} : f32[1,2,3,1]
  %2 = cast %1 {to=i8} : i8[1,2,3,1]
  return %1 as "probabilities", %2 as "small"
}
'''


def parameter(name: str = "x", *shape: int, dtype: DType = DType.f32) -> Node:
    return ops.make("input", shape=shape, dtype=dtype, label=name)


def again(graph: Graph) -> Graph:
    """`graph` printed and parsed; the two print alike."""
    text = print_graph(graph)
    parsed = parse_graph(text, constants_of(graph))
    assert print_graph(parsed) == text
    return parsed


def test_sample_is_canonical() -> None:
    graph = parse_graph(SAMPLE)
    verify(graph)
    assert print_graph(graph) == SAMPLE
    assert graph.output_names == ("probabilities", "small")
    assert graph.outputs[0].inputs[0].origin == "conv1/Conv2D"


@settings(max_examples=200, deadline=None)
@given(name=st.text(max_size=12), origin=st.text(max_size=12), output=st.text(max_size=12))
def test_names_round_trip_and_stay_on_their_line(name: str, origin: str, output: str) -> None:
    x = parameter("x", 2)
    y = ops.make("neg", x, label=name, origin=origin)
    graph = Graph(name, (x,), (ops.make("exp", y),), (output,))
    assert len(print_graph(graph).split("\n")) == 6
    assert print_graph(graph).isascii()
    parsed = again(graph)
    assert (parsed.name, parsed.output_names) == (name, (output,))
    node = parsed.outputs[0].inputs[0]
    assert node.origin == origin
    assert node.name == ("" if name == "x" else name)  # a name that is taken is not repeated


@settings(max_examples=200, deadline=None)
@given(value=st.sampled_from(list(DType)).flatmap(lambda d: arrays.arrays(
    d.numpy, arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))))
def test_constants_round_trip_bit_by_bit(value: np.ndarray) -> None:
    graph = Graph("g", (), (constant(value),), ("y",))
    result = again(graph).outputs[0].value
    assert (result.dtype, result.shape, result.tobytes()) == (value.dtype, value.shape, value.tobytes())


@settings(max_examples=100, deadline=None)
@given(lo=st.floats(allow_nan=False), hi=st.floats(allow_nan=False))
def test_float_attributes_are_exact(lo: float, hi: float) -> None:
    x = parameter("x", 2)
    parsed = again(Graph("g", (x,), (ops.make("clip", x, lo=lo, hi=hi),), ("y",)))
    assert (parsed.outputs[0].attrs["lo"], parsed.outputs[0].attrs["hi"]) == (lo, hi)


def test_quantization_sparsity_batch_and_state() -> None:
    q = TensorType((2, 3), DType.i8, Quant((0.5,), (-3,)))
    w = TensorType((2, 3), DType.i8, Quant((0.5, 0.25), (0, 1), 0), Sparsity("block4x16", 0.75))
    x = parameter("x", 2, 3, dtype=DType.i8)
    x = Node("input", (), x.attrs, q, "x")
    c = constant(np.arange(6, dtype=np.int8).reshape(2, 3))
    y = ops.make("add", x, Node("const", (), c.attrs, w, "w"))
    graph = Graph("g", (x,), (y,), ("y",), batch_max=8, states=((x, y),))
    parsed = again(graph)
    assert (parsed.inputs[0].type, parsed.outputs[0].inputs[1].type, parsed.batch_max) == (q, w, 8)
    assert parsed.states == ((parsed.inputs[0], parsed.outputs[0]),)


def test_equal_names_become_numbers() -> None:
    x = parameter("x", 2)
    y = ops.make("neg", ops.make("exp", x, label="same"), label="same")
    parsed = again(Graph("g", (x,), (y,), ("y",)))
    assert [n.name for n in parsed.nodes] == ["x", "same", ""]


def test_files(tmp_path: Path) -> None:
    value = np.arange(100, dtype=np.float32)
    x = parameter("x", 100)
    graph = Graph("g", (x,), (ops.make("add", x, constant(value)),), ("y",))
    save_text(graph, tmp_path / "model.txt")
    assert print_graph(load_text(tmp_path / "model.txt")) == print_graph(graph)
    np.savez(tmp_path / "model.npz", **{content_hash(value): value + 1})
    with pytest.raises(InvalidModelError, match="damaged"):
        load_text(tmp_path / "model.txt")
    (tmp_path / "model.npz").write_bytes(b"not a zip file")
    with pytest.raises(InvalidModelError, match="model.txt"):
        load_text(tmp_path / "model.txt")
    (tmp_path / "model.npz").unlink()
    with pytest.raises(InvalidModelError, match=f"line 2: constant #{content_hash(value)}"):
        load_text(tmp_path / "model.txt")
    with pytest.raises(InvalidModelError, match="none.txt"):
        load_text(tmp_path / "none.txt")


@pytest.mark.parametrize(("old", "new", "message"), [
    ("graph @kws", "graf @kws", "line 1: expected 'graph'"),
    ("%x: f32[1,4,4,1]", "%x: f33[1,4,4,1]", "line 1: unknown element type 'f33'"),
    ("%x: f32[1,4,4,1]", "%x: f32[1,-4,4,1]", "line 1: .*negative dimension"),
    ("%x: f32[1,4,4,1]", "%x: f32[99999999,99999999]", "line 1: .*2\\^40 elements"),
    ("[1.0,2.0,3.0,4.0]", "[1.0,2.0,3.0]", "line 2: expected 4 numbers"),
    ("[1.0,2.0,3.0,4.0]", "[1.0,2.0,3.0,\"4\"]", "line 2: expected 4 numbers"),
    ("[1.0,2.0,3.0,4.0]", "#0123456789ab", "line 2: constant #0123456789ab is not in the file"),
    ("conv2d", "conv3d", "line 3: unknown operation 'conv3d'"),
    ("%x, %w {", "%x, %v {", "line 3: %v is not defined before this line"),
    ("stride=[2,2]", "stride=[2,2], stride=[2,2]", "line 3: attribute 'stride' is given twice"),
    ("stride=[2,2]", "colour=[2,2]", "line 3: conv2d has no attribute 'colour'"),
    ("stride=[2,2]", "stride=7", "line 3: conv2d: attributes do not fit"),
    ("stride=[2,2]", "stride=[2,2", "line 3: expected"),
    ("stride=[2,2]", "stride=" + "[" * 50 + "]" * 50, "line 3: lists are nested too deeply"),
    ("f32[1,2,3,1]  ; conv1", "f32[1,2,2,1]  ; conv1", r"line 3: conv2d has type f32\[1,2,3,1\], not f32\[1,2,2,1\]"),
    ("%1 = clip", "%0 = clip", "line 4: %0 is defined twice"),
    ("%1 = clip", "%-1 = clip", "line 4: %-1 is no value"),
    ("hi=inf", "hi=$", "line 4: cannot read"),
    ("to=i8}", 'to="\\ud8"}', "line 5: malformed string"),
    ("return %1", "returns %1", "line 6: expected '%'"),
    ('as "probabilities"', "", "line 6: expected 'as'"),
    ("\n}", "", "line 6: the graph ends without"),
    ("\n}", "\n}\n}", "line 8: text after the end"),
])
def test_errors_name_the_line(old: str, new: str, message: str) -> None:
    assert old in SAMPLE
    with pytest.raises(InvalidModelError, match=message) as e:
        parse_graph(SAMPLE.replace(old, new, 1))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("text", ["", "\n\n", "graph", "}", "graph @g() {", "\0", "graph @g() {\n  return\n}"])
def test_fragments_are_refused(text: str) -> None:
    with pytest.raises(InvalidModelError, match="line "):
        parse_graph(text)


@settings(max_examples=400, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
@example(seed=17642)  # a cast to a number
def test_mutated_text_is_parsed_or_refused(seed: int) -> None:
    """Whatever a few random edits make of a text: a graph, or one line of error; never a crash."""
    rng = random.Random(seed)
    text = list(SAMPLE)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(text))
        edit = rng.choice(["delete", "insert", "copy"])
        if edit == "delete":
            del text[at:at + rng.randint(1, 5)]
        elif edit == "insert":
            text[at:at] = rng.choice('%[]{}=,:;"\\0123456789-einfraws #\n')
        else:
            other = rng.randrange(len(text))
            text[at:at] = text[other:other + rng.randint(1, 20)]
    try:
        verify(parse_graph("".join(text)))
    except SkiveError as e:
        assert "\n" not in str(e)
