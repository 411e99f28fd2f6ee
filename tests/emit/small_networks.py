"""Small networks that together need every kernel the compiler can choose."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from fixed_point import fixed_point
from onnx import TensorProto, helper, numpy_helper

from skive import ops, passes
from skive.frontend.onnx import import_onnx
from skive.ir import Graph, Node, constant
from skive.pipeline import PassManager
from skive.types import DType

KEYWORDS = Path(__file__).resolve().parents[2] / "examples" / "keyword_spotting" / "kws_dscnn.onnx"

NETWORKS: dict[str, Callable[[], Graph]] = {}


class Net:
    """Collects inputs and outputs; weights come from a fixed seed."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.rng = np.random.default_rng(len(name))
        self.inputs: list[Node] = []
        self.outputs: list[Node] = []

    def input(self, *shape: int, dtype: DType = DType.f32) -> Node:
        self.inputs.append(ops.make("input", shape=shape, dtype=dtype, label=f"x{len(self.inputs)}"))
        return self.inputs[-1]

    def weights(self, *shape: int, dtype: DType = DType.f32) -> Node:
        """Normal floats of about unit gain, small integers."""
        if dtype.is_float:
            gain = np.sqrt(max(1, np.prod(shape[1:])))
            return constant((self.rng.standard_normal(shape) / gain).astype(dtype.numpy))
        return constant(self.rng.integers(0, 4, shape).astype(dtype.numpy))

    def output(self, *nodes: Node) -> None:
        self.outputs += nodes

    def graph(self) -> Graph:
        names = tuple(f"y{i}" for i in range(len(self.outputs)))
        return Graph(self.name, tuple(self.inputs), tuple(self.outputs), names)


def network(build: Callable[[Net], None]) -> Callable[[Net], None]:
    """Adds the network that `build` makes to NETWORKS under the function's name."""

    def make() -> Graph:
        net = Net(build.__name__)
        build(net)
        return net.graph()

    NETWORKS[build.__name__] = make
    return build


@network
def convolutions(net: Net) -> None:
    x = net.input(1, 9, 11, 3)
    same = {"pad": (1, 1, 1, 1)}
    y = ops.make("conv2d", x, net.weights(24, 3, 3, 3), net.weights(24), stride=(2, 1), epilogue="t0=relu(x0)", **same)
    z = ops.make("conv2d", y, net.weights(24, 3, 3, 24), net.weights(24), y, epilogue="t0=add(x0,x1)", **same)
    z = ops.make("conv2d", z, net.weights(24, 3, 3, 1), net.weights(24), groups=24, **same)  # depthwise
    z = ops.make("conv2d", z, net.weights(12, 3, 3, 8), groups=3, pad=(2, 2, 2, 2), dilation=(2, 2))
    z = ops.make("conv2d", z, net.weights(17, 1, 1, 12), net.weights(17))
    up = ops.make("conv_transpose2d", z, net.weights(5, 3, 3, 17), net.weights(5), stride=(2, 2), pad=(1, 1, 0, 0))
    net.output(up, ops.make("conv_transpose2d", z, net.weights(17, 2, 2, 1), groups=17))


@network
def pools(net: Net) -> None:
    x = net.input(2, 7, 8, 20)
    low = ops.make("max_pool2d", x, kernel=(3, 3), stride=(2, 2), pad=(1, 1, 1, 1))
    mean = ops.make("avg_pool2d", x, kernel=(3, 2), stride=(2, 2), pad=(1, 0, 1, 0), epilogue="t0=relu(x0)")
    joined = ops.make("concat", low, mean, axis=3)
    rows = [constant(np.array([[0, 0], [0, 1], [6, 6]], np.int32)),
            constant(np.array([[1, 0], [0.25, 0.75], [1, 0]], np.float32))]
    nearest = constant(np.array([[0], [7], [3]], np.int32)), constant(np.ones((3, 1), np.float32))
    net.output(ops.make("resize2d", x, *rows, *nearest, net.weights(20), epilogue="t0=mul(x0,x1)"), joined,
               ops.make("avg_pool2d", joined, kernel=(2, 2), pad=(1, 1, 1, 1), count_pad=True),
               ops.make("reduce_mean", joined, axes=(1, 2), keep=False))


@network
def channel_slices(net: Net) -> None:
    """Slices of channels read and written in place, at odd offsets and at the end of the memory."""
    x = net.input(2, 7, 6, 51)
    same = {"pad": (1, 1, 1, 1)}
    last, middle = (ops.make("slice", x, start=(0, 0, 0, s), size=(2, 7, 6, 18), step=(1, 1, 1, 1)) for s in (33, 17))
    net.output(ops.make("conv2d", last, net.weights(17, 3, 3, 18), net.weights(17), **same),
               ops.make("conv2d", last, net.weights(4, 3, 3, 9), groups=2, stride=(2, 2), **same),
               ops.make("conv2d", last, net.weights(18, 3, 3, 1), net.weights(18), middle, groups=18, **same,
                        epilogue="t0=add(x0,x1)"),
               ops.make("conv_transpose2d", last, net.weights(3, 3, 3, 18), stride=(2, 2)),
               ops.make("avg_pool2d", last, kernel=(3, 3), count_pad=True, **same),
               ops.make("linear", last, net.weights(5, 18)), ops.make("reduce_mean", last, axes=(1, 2)),
               ops.make("mul", ops.make("sigmoid", middle), last))
    y = ops.make("conv2d", middle, net.weights(38, 1, 1, 18), net.weights(38))
    halves = [ops.make("slice", y, start=(0, 0, 0, s), size=(2, 7, 6, 19), step=(1, 1, 1, 1)) for s in (0, 19)]
    branch = ops.make("tanh", ops.make("conv2d", halves[1], net.weights(21, 3, 3, 19), net.weights(21), **same))
    block = ops.make("concat", *halves, branch, axis=3)  # the halves lie where they are wanted
    swapped = ops.make("concat", ops.make("conv2d", block, net.weights(9, 1, 1, 59)), block, axis=3)
    net.output(ops.make("max_pool2d", swapped, kernel=(2, 2)), halves[0])
    row = net.input(1, 1, 30, 1024)  # its pixels clash in the cache: conv2d copies them first
    row = ops.make("slice", row, start=(0, 0, 0, 16), size=(1, 1, 30, 1008), step=(1, 1, 1, 1))
    net.output(ops.make("conv2d", row, net.weights(8, 1, 1, 1008)))


@network
def group_norms(net: Net) -> None:
    """Of one image by all its workers, with an epilogue per channel and per sample; of more than one vector."""
    x = net.input(2, 5, 5, 96)
    y = ops.make("group_norm", x, net.weights(96), net.weights(96), groups=24)
    y = ops.make("silu", ops.make("mul", y, net.input(2, 1, 1, 96)))
    net.output(ops.make("group_norm", y, net.weights(96), groups=1))
    net.output(ops.make("group_norm", net.input(1, 30, 7), net.weights(7), net.weights(7), groups=7))


@network
def transformer(net: Net) -> None:
    tokens = net.input(1, 6, dtype=DType.i64)
    mask = net.input(1, 1, 6, 6)
    x = ops.make("gather", net.weights(50, 24), tokens, axis=0)
    h = ops.make("layer_norm", x, net.weights(24), net.weights(24))
    q, k, v = (ops.make("reshape", ops.make("linear", h, net.weights(24, 24), net.weights(24)), shape=(1, 6, 3, 8))
               for _ in range(3))
    a = ops.make("attention", q, k, v, mask, scale=8**-0.5, token_major=True)
    x = ops.make("add", x, ops.make("reshape", a, shape=(1, 6, 24)))
    first = [ops.make("transpose", t, perm=(0, 2, 1, 3)) for t in (q, k, v)]
    causal = ops.make("attention", *first, scale=8**-0.5, causal=True)
    h = ops.make("l2_norm", ops.make("rms_norm", x, net.weights(24)), least=0.5)
    wide = ops.make("gelu", ops.make("linear", h, net.weights(40, 24)))
    x = ops.make("linear", wide, net.weights(24, 40), net.weights(24), x, epilogue="t0=add(x0,x1)")
    scores = ops.make("matmul", *first[:2], trans_b=True)
    net.output(causal, ops.make("softmax", scores), ops.make("softmax", x, axis=1), ops.make("log_softmax", x),
               ops.make("matmul", scores, scores, trans_a=True, epilogue="t0=tanh(x0)"))


@network
def recurrent(net: Net) -> None:
    x = net.input(5, 2, 9)
    h0, c0 = net.input(2, 8), net.input(2, 8)

    def weights(gates: int) -> list[Node]:
        return [net.weights(gates * 8, 9), net.weights(gates * 8, 8), net.weights(2, gates * 8)]

    net.output(ops.make("lstm", x, *weights(4), h0, c0), ops.make("lstm", x, *weights(4), h0, c0, net.weights(24)),
               ops.make("gru", x, *weights(3), h0), ops.make("gru", x, *weights(3), h0, reset_after=True),
               ops.make("rnn", x, *weights(1), h0))
    for name, gates, others in (("lstm", 4, [h0, c0]), ("gru", 3, [net.weights(8), h0])):
        pre = ops.make("linear", x, net.weights(gates * 8, 9))
        bytes_ = constant((net.weights(gates * 8, 8).value * 127).clip(-127, 127).astype(np.int8))
        net.output(ops.make(f"{name}_steps", pre, net.weights(gates * 8, 8), *others),
                   ops.make(f"quantized_{name}", pre, bytes_, net.weights(gates * 8), *others))


@network
def indexing(net: Net) -> None:
    x = net.input(4, 6, 5)
    where = net.input(4, 3, 5, dtype=DType.i64)
    taken = ops.make("gather_elements", x, where, axis=1)
    tuples = constant(np.array([[0, 1], [3, -1], [2, 2]], np.int64))
    picked = ops.make("gather_nd", x, tuples)
    spread = ops.make("scatter_elements", x, where, taken, axis=1, reduction="add")
    written = ops.make("scatter_nd", x, tuples, picked)
    order = ops.make("topk_indices", x, k=3)
    net.output(taken, picked, spread, written, order, ops.make("topk_values", spread, k=2, largest=False),
               ops.make("argmax", x, axis=1, last=True), ops.make("argmin", x, axis=-1, keep=False),
               ops.make("cumsum", x, axis=1, reverse=True), ops.make("cumprod", x, axis=2, exclusive=True))


@network
def movement(net: Net) -> None:
    x = net.input(3, 5, 7)
    t = ops.make("transpose", x, perm=(2, 0, 1))
    backwards = ops.make("slice", x, start=(0, 4, 1), size=(2, 5, 3), step=(2, -1, 2))
    view = ops.make("slice", x, start=(1, 0, 0), size=(1, 5, 7), step=(1, 1, 1))
    padded = [ops.make("pad", x, before=(0, 2, 1), after=(0, 1, 3), mode=m, value=v)
              for m, v in (("constant", 1.5), ("reflect", 0.0), ("edge", 0.0), ("wrap", 0.0))]
    wide = ops.make("expand", ops.make("reshape", view, shape=(1, 5, 7)), shape=(4, 5, 7))
    joined = ops.make("concat", ops.make("tanh", x), ops.make("sigmoid", x), axis=2)  # written in place
    net.output(t, backwards, view, *padded, wide, joined, ops.make("concat", wide, x, axis=0))


@network
def elementwise(net: Net) -> None:
    x, y = net.input(3, 1, 19), net.input(4, 1)
    names = ("exp", "sin", "erf", "softplus", "mish", "elu", "floor", "round_even", "hard_swish")
    table = [ops.make(n, x) for n in names]
    total = table[0]
    for t in table[1:]:
        total = ops.make("add", total, t)
    both = ops.make("mul", ops.make("sub", total, y), net.weights(19))
    keep = ops.make("greater", both, y)
    power = ops.make("pow", ops.make("abs", x), constant(np.float32(1.5)))
    log = ops.make("log", ops.make("add", power, constant(np.float32(1))))
    net.output(ops.make("where", keep, both, y), keep, ops.make("cast", both, to=DType.i32), log,
               ops.make("clip", x, lo=-1.0, hi=float("inf")), ops.make("prelu", both, y), ops.make("fmod", both, x),
               ops.make("is_nan", ops.make("sqrt", x)))


@network
def other_types(net: Net) -> None:
    a, b = net.input(2, 3, 4, dtype=DType.i32), net.input(3, 4, dtype=DType.i32)
    d = net.input(3, 8, dtype=DType.f64)
    u = net.input(5, dtype=DType.u8)
    img = net.input(1, 6, 6, 4, dtype=DType.i8)
    net.output(ops.make("div", a, b), ops.make("mod", a, b), ops.make("reduce_prod", a, axes=(0, 2)),
               ops.make("reduce_sum", a, axes=(1,), keep=False), ops.make("bit_xor", a, b), ops.make("softmax", d),
               ops.make("reduce_max", d, axes=(1,)), ops.make("matmul", d, net.weights(8, 2, dtype=DType.f64)),
               ops.make("shift_left", u, constant(np.uint8(3))), ops.make("cast", u, to=DType.bool),
               ops.make("conv2d", img, net.weights(6, 3, 3, 2, dtype=DType.i8), groups=2, pad=(1, 1, 1, 1)),
               ops.make("conv_transpose2d", img, net.weights(3, 2, 2, 4, dtype=DType.i8), stride=(2, 2)),
               ops.make("max_pool2d", img, kernel=(2, 2), stride=(2, 2)),
               ops.make("matmul", a, b, trans_b=True), ops.make("cumsum", b, axis=0),
               ops.make("concat", ops.make("neg", a), ops.make("abs", a), axis=2),
               ops.make("concat", ops.make("neg", d), ops.make("abs", d), axis=1),
               ops.make("max_pool2d", net.input(1, 4, 4, 3, dtype=DType.i32), kernel=(2, 2)))


@network
def weights_as_inputs(net: Net) -> None:
    x, w, b = net.input(1, 6, 5, 4), net.input(8, 3, 3, 2), net.input(8)
    y = ops.make("conv2d", x, w, b, groups=2, pad=(1, 0, 1, 0), stride=(1, 2))
    net.output(y, ops.make("conv_transpose2d", y, net.input(3, 2, 2, 8)))
    h, seq = net.input(1, 4), net.input(3, 1, 5)
    net.output(ops.make("rnn", seq, net.input(4, 5), net.input(4, 4), net.input(2, 4), h))


def integer_windows(net: Net) -> None:
    """Convolutions of every kind, a residual sum, and what moves or sums stored values between them."""
    x = net.input(1, 9, 11, 3)
    same = {"pad": (1, 1, 1, 1)}
    y = ops.make("relu", ops.make("conv2d", x, net.weights(24, 3, 3, 3), net.weights(24), stride=(2, 1), **same))
    z = ops.make("conv2d", y, net.weights(24, 3, 3, 24), net.weights(24), **same)
    z = ops.make("relu", ops.make("add", z, y))
    z = ops.make("conv2d", z, net.weights(24, 3, 3, 1), net.weights(24), groups=24, **same)
    z = ops.make("clip", z, lo=0, hi=6)
    wide = ops.make("conv2d", z, net.weights(48, 3, 3, 1), groups=24, stride=(2, 2), **same)
    z = ops.make("conv2d", z, net.weights(12, 3, 3, 8), groups=3, pad=(2, 2, 2, 2), dilation=(2, 2))
    z = ops.make("conv2d", z, net.weights(17, 1, 1, 12), net.weights(17))
    up = ops.make("conv_transpose2d", z, net.weights(5, 3, 3, 17), net.weights(5), stride=(2, 2), pad=(1, 1, 0, 0))
    own = ops.make("conv_transpose2d", z, net.weights(17, 2, 2, 1), groups=17)
    row = ops.make("conv2d", net.input(1, 1, 40, 8), net.weights(8, 1, 5, 1), groups=8, pad=(0, 2, 0, 2))
    net.output(up, own, ops.make("conv2d", wide, net.weights(4, 1, 1, 48)),
               ops.make("conv2d", row, net.weights(9, 1, 1, 8)),
               ops.make("relu", ops.make("conv2d", y, net.weights(4, 3, 3, 24), net.weights(4), **same)))


def zero_blocks(net: Net) -> None:
    """Weights that are zero in blocks: windows, a border, rows, a vector, a block that reads nothing."""

    def weights(*shape: int) -> Node:
        w = net.weights(*shape).value.reshape(shape[0], -1, shape[-1]).copy()
        for block in range(0, shape[0], 16):
            for first in range(0, shape[-1], 4):
                w[block : block + 16, net.rng.random(w.shape[1]) < 0.8, first : first + 4] = 0
        w[:16] = 0
        return constant(w.reshape(shape))

    x = net.input(1, 9, 11, 24)
    y = ops.make("relu", ops.make("conv2d", x, weights(40, 3, 3, 24), net.weights(40), pad=(1, 1, 1, 1)))
    y = ops.make("relu", ops.make("conv2d", y, weights(64, 1, 1, 40), net.weights(64), stride=(2, 2)))
    pooled = ops.make("reduce_mean", y, axes=(1, 2), keep=False)
    rows = ops.make("reshape", y, shape=(30, 64))
    net.output(ops.make("linear", rows, weights(33, 64), net.weights(33)),
               ops.make("linear", pooled, weights(32, 64), net.weights(32)))
    single = net.weights(35, 64).value * (net.rng.random((35, 64)) < 0.1)
    net.output(ops.make("linear", rows, constant(single.astype(np.float32)), net.weights(35)))


def integer_pools(net: Net) -> None:
    """Pools, joined and sliced channels, and vectors behind a mean."""
    x = net.input(2, 7, 8, 20)
    y = ops.make("relu", ops.make("conv2d", x, net.weights(20, 1, 1, 20), net.weights(20)))
    low = ops.make("max_pool2d", y, kernel=(3, 3), stride=(2, 2), pad=(1, 1, 1, 1))
    mean = ops.make("avg_pool2d", y, kernel=(3, 2), stride=(2, 2), pad=(1, 0, 1, 0))
    z = ops.make("conv2d", ops.make("concat", low, mean, axis=3), net.weights(33, 3, 3, 40), net.weights(33))
    half = ops.make("slice", z, start=(0, 0, 0, 5), size=(*z.shape[:3], 11), step=(1, 1, 1, 1))
    gate = ops.make("reduce_mean", z, axes=(1, 2), keep=False)
    gate = ops.make("relu", ops.make("linear", gate, net.weights(31, 33), net.weights(31)))
    net.output(ops.make("linear", gate, net.weights(7, 31)), ops.make("conv2d", half, net.weights(6, 2, 1, 11)),
               ops.make("avg_pool2d", z, kernel=(1, 2), count_pad=True))


def islands(net: Net) -> None:
    """Float32 between integers: fused behind a contraction, in a kernel of its own, and a whole one in float32."""
    x = net.input(1, 5, 6, 9)
    y = ops.make("silu", ops.make("conv2d", x, net.weights(19, 3, 3, 9), net.weights(19)))
    z = ops.make("softmax", ops.make("conv2d", y, net.weights(19, 1, 1, 19)))
    gate = ops.make("reduce_mean", ops.make("conv2d", z, net.weights(19, 1, 1, 19)), axes=(1, 2))
    y = ops.make("mul", ops.make("conv2d", y, net.weights(19, 1, 1, 19)), ops.make("sigmoid", gate))
    net.output(ops.make("conv2d", y, net.weights(6, 2, 2, 19), net.weights(6)))


def tokens(net: Net) -> None:
    """A transformer block and a classifier: attention, softmax, layer normalisation, an activation of one byte."""
    x, mask = net.input(1, 7, 24), constant(np.where(np.arange(7) < 5, 0, -1e9).astype(np.float32).reshape(1, 1, 1, 7))

    def dense(v: Node, n: int) -> Node:
        return ops.make("linear", v, net.weights(n, v.shape[-1]), net.weights(n))

    scale = constant(net.rng.uniform(0.5, 1.5, 24).astype(np.float32))
    h = ops.make("layer_norm", dense(x, 24), scale, net.weights(24))
    h = ops.make("l2_norm", dense(ops.make("rms_norm", dense(h, 24), scale), 24))
    heads = [ops.make("reshape", dense(h, 24), shape=(1, 7, 3, 8)) for _ in range(3)]
    a = ops.make("attention", *heads, *([] if net.name.endswith("only") else [mask]), scale=8**-0.5, token_major=True)
    h = ops.make("add", x, dense(ops.make("reshape", a, shape=(1, 7, 24)), 24))
    wide = ops.make("concat", ops.make("gelu", dense(h, 24)), ops.make("silu", dense(h, 16)), axis=2)
    h = ops.make("add", h, dense(wide, 24))
    pooled = ops.make("reduce_mean", h, axes=(1,), keep=False)
    net.output(ops.make("softmax", dense(pooled, 7)))


def compressed() -> Graph:
    """Weights of 8 and 4 bits beside activations of every kind."""
    net = Net("compressed")
    x = net.input(3, 96)
    for options in ("bits=8", "bits=4,group=32", "bits=4,activation=8", "bits=8,activation=32"):
        y = ops.make("silu", ops.make("linear", x, net.weights(70, 96), net.weights(70)))
        part = Graph("part", (x,), (ops.make("linear", y, net.weights(9, 70)),), ("y",))
        part, _ = PassManager().run(part, f"compress-weights{{{options}}}", check="never")
        net.output(*part.outputs)
    return PassManager().run(net.graph(), passes.FUSED, check="never")[0]


def resized() -> Graph:
    """Images in two sizes: nearest neighbours and linear interpolation."""
    nodes = [helper.make_node("Resize", ["x", "", "scales"], ["up"], mode="nearest"),
             helper.make_node("Relu", ["up"], ["r"]),
             helper.make_node("Resize", ["r", "", "", "size"], ["y"], mode="linear")]
    graph = helper.make_graph(
        nodes, "resized", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 5, 6, 4])],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("r", "y")],
        [numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "scales"),
         numpy_helper.from_array(np.array([1, 5, 7, 9], np.int64), "size")])
    return import_onnx(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


def keywords() -> Graph:
    """The shipped keyword-spotting model."""
    return import_onnx(KEYWORDS, input_shapes={"input": (1, 1, 49, 10)})


def in_fixed_point(build: Callable[[Net], None], form: str) -> Callable[[], Graph]:
    """The network that `build` makes, in 8 or 16 bits or, "only", in 8 bits without any float arithmetic."""

    def make() -> Graph:
        net = Net(f"{build.__name__}_{form}")
        build(net)
        return fixed_point(net.graph(), "int8" if form == "only" else form, integer_only=form == "only")

    return make


FIXED_POINT = {f"{build.__name__}_{dtype}": in_fixed_point(build, dtype)
               for build in (integer_windows, integer_pools, islands, zero_blocks) for dtype in ("int8", "int16")}
network(zero_blocks)
NETWORKS |= {"resized": resized, "keywords": keywords, "compressed": compressed, **FIXED_POINT,
             **{f"tokens_{form}": in_fixed_point(tokens, form) for form in ("int8", "only")}}
