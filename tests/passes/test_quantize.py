"""What the quantized graph looks like and what it guarantees."""

from __future__ import annotations

import numpy as np
import pytest

from skive import ops
from skive.errors import QuantizationError
from skive.ir import Graph, Node, constant
from skive.passes import integer_arithmetic
from skive.passes.equalise import Channels, equalised
from skive.passes.integer_arithmetic import window_reach
from skive.passes.quantize import Quantizer, Scheme, Storage, affine, fixed, reach
from skive.pipeline import random_inputs
from skive.reference import evaluate_graph
from skive.text import parse_graph
from skive.types import DType
from skive.verify import verify

RNG = np.random.default_rng(3)


@pytest.fixture(autouse=True)
def _same_numbers_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "RNG", np.random.default_rng(3))


def normal(*shape: int, scale: float = 1.0) -> Node:
    return constant((RNG.standard_normal(shape) * scale).astype(np.float32))


def image(*shape: int) -> Node:
    return ops.make("input", shape=shape, dtype=DType.f32, label="x")


def conv(x: Node, channels: int, *, kernel: int = 1, name: str = "", **attrs: object) -> Node:
    ic = x.shape[-1] // attrs.get("groups", 1)  # type: ignore[operator]
    return ops.make("conv2d", x, normal(channels, kernel, kernel, ic, scale=(kernel * kernel * ic) ** -0.5),
                    normal(channels), pad=(kernel // 2,) * 4, origin=name, label=name, **attrs)


def relu(x: Node) -> Node:
    return ops.make("relu", x, origin=x.origin, label=x.name + "_relu")


def graph_of(*outputs: Node) -> Graph:
    inputs = tuple(n for n in Graph("g", (), outputs, ("",) * len(outputs)).nodes if n.op == "input")
    return Graph("g", inputs, outputs, tuple(f"y{i}" for i in range(len(outputs))))


def observed_ranges(graph: Graph, storage: Storage) -> dict[Node, tuple[float, float]]:
    values: dict[Node, np.ndarray] = {}
    evaluate_graph(graph, random_inputs(graph), observe=values.__setitem__)
    return {n: (float(values[n].min()), float(values[n].max())) for n in storage.sources}


def quantized(graph: Graph, **scheme: object) -> tuple[Quantizer, Graph]:
    storage = Storage(graph)
    quantizer = Quantizer(graph, Scheme(observed_ranges(graph, storage), **scheme), storage)  # type: ignore[arg-type]
    built = quantizer.build()
    verify(built)
    return quantizer, built


def test_a_residual_operand_is_not_rounded() -> None:
    a = relu(conv(image(1, 4, 4, 3), 8, name="a"))
    b = conv(a, 8, name="b")
    s = relu(ops.make("add", b, a, origin="s", label="s"))
    storage = Storage(graph_of(conv(s, 4, name="c")))
    assert {n.name for n in storage.sources} == {"x", "a_relu", "s_relu"}  # neither b nor the sum before its relu


@pytest.mark.parametrize("dtype", ["int8", "int16"])
def test_a_value_joined_with_a_much_larger_constant(dtype: str) -> None:
    """The concatenation has a scale of its own, and nothing was observed of it."""
    a = relu(conv(image(1, 4, 4, 3), 8, name="a"))
    c = ops.make("concat", a, constant(np.full((1, 4, 4, 2), 1000, np.float32)), axis=3)
    quantizer, _ = quantized(graph_of(conv(c, 2, name="b"), conv(a, 2, name="d")), dtype=dtype)
    assert quantizer.format_of(c).scale > quantizer.format_of(a).scale


def test_islands_and_outputs_stay_float() -> None:
    x = image(1, 5, 8)
    a = ops.make("linear", x, normal(8, 8), origin="a", label="a")
    s = ops.make("softmax", a, origin="s", label="s")
    y = ops.make("linear", s, normal(3, 8), origin="y", label="y")
    quantizer, graph = quantized(graph_of(y))
    assert {n.name for n in quantizer.storage.sources} == {"x", "s"}
    assert graph.outputs[0].dtype is DType.f32 and graph.outputs[0].op == "linear"


def test_moves_pass_integers_on() -> None:
    a = relu(conv(image(1, 4, 4, 3), 8, name="a"))
    p = ops.make("max_pool2d", a, kernel=(2, 2), stride=(2, 2))
    t = ops.make("reshape", ops.make("transpose", p, perm=(0, 3, 1, 2)), shape=(1, 32))
    _, graph = quantized(graph_of(ops.make("linear", t, normal(4, 32), origin="fc")))
    moved = [n for n in graph.nodes if n.op in ("max_pool2d", "transpose", "reshape")]
    assert len(moved) == 3 and all(n.dtype is DType.u8 for n in moved)
    assert sum(n.op == "quantize" for n in graph.nodes) == 2


@pytest.mark.parametrize(("window", "rounded"), [(2, True), (4, False)])
def test_averages_that_are_normalised_are_not_rounded(window: int, rounded: bool) -> None:
    """A head on pooled features, whose averages hardly differ. What a contraction reads is rounded in any case."""
    a = relu(conv(image(1, 8, 8, 3), 8, name="a"))
    average, largest = (ops.make(op, a, kernel=(window, window), stride=(window, window), label=op)
                        for op in ("avg_pool2d", "max_pool2d"))
    joined = ops.make("concat", average, largest, axis=3, label="joined")
    features = ops.make("reshape", joined, shape=(1, joined.type.size))
    factors, offsets = normal(joined.type.size, scale=20), normal(joined.type.size)
    n = ops.make("add", ops.make("mul", features, factors), offsets, label="normalised")
    y = ops.make("linear", n, normal(4, n.shape[1]), origin="fc")
    storage = Storage(graph_of(y))
    assert {a, n} < storage.stored and (average in storage.stored) == (joined in storage.stored) == rounded
    assert average in Storage(graph_of(ops.make("linear", features, normal(4, n.shape[1]), origin="fc"))).stored


@pytest.mark.parametrize("shared", [False, True])
def test_concatenated_values_share_a_scale_where_it_costs_nothing(shared: bool) -> None:
    x = image(1, 4, 4, 3)
    a, b = relu(conv(x, 8, name="a")), relu(ops.make("mul", conv(x, 8, name="b"), constant(np.float32(50))))
    c = ops.make("concat", a, b, axis=3, label="c")
    outputs = [conv(c, 4, name="d")] + ([conv(a, 4, name="e")] if shared else [])
    quantizer, graph = quantized(graph_of(*outputs))
    assert quantizer.format_of(b) == quantizer.format_of(c)
    # a has another reader, which a range fifty times too wide would hurt: it is rounded again for the joint value.
    assert (quantizer.format_of(a) == quantizer.format_of(c)) is not shared
    want = evaluate_graph(quantizer.graph, random_inputs(graph))
    for g, w in zip(evaluate_graph(graph, random_inputs(graph)), want, strict=True):
        assert np.abs(g - w).max() < 0.05 * np.abs(w).max()


def test_zero_is_exact_and_relu_is_saturation() -> None:
    form = affine(-1.0, 2.0)
    assert form.real(np.float32(0)) == 0 and form.range[0] <= -0.99 and form.range[1] >= 1.99
    _, graph = quantized(graph_of(conv(relu(conv(image(1, 4, 4, 3), 8, name="a")), 4, name="b")))
    assert not any(n.op == "relu" for n in graph.nodes)


def test_kept_layers_stay_float() -> None:
    graph = graph_of(conv(relu(conv(image(1, 4, 4, 3), 8, name="a")), 4, name="b"))
    storage = Storage(graph, lambda n: n.origin == "b")
    assert [n.origin for n in storage.products] == ["a"]
    assert {n.name for n in storage.sources} == {"x"}


def test_a_missing_range_is_named() -> None:
    graph = graph_of(conv(image(1, 4, 4, 3), 8, name="a"))
    with pytest.raises(QuantizationError, match="x: the range"):
        Quantizer(graph, Scheme({}))


@pytest.mark.parametrize("bits", range(8, 17))
def test_fixed_point_covers_its_range_within_half_a_step(bits: int) -> None:
    for low, high in [(-3.0, 1.0), (0.0, 0.7), (-1e-3, 1e3)]:
        form = fixed(low, high, bits)
        assert np.log2(form.scale) == round(np.log2(form.scale))
        x = RNG.uniform(low, high, 1000).astype(np.float32)
        assert np.abs(form.real(x) - x).max() <= form.scale / 2 * (1 + 1e-6)
        assert form.bits <= bits


def test_16_bit_sums_fit_where_full_width_operands_overflow() -> None:
    """The largest activations against all-positive weights: 16-bit operands as they are leave 32 bits, ours do not."""
    k = 512
    w = np.ones((4, k), np.float32)
    graph = graph_of(ops.make("linear", image(1, k), constant(w), constant(np.float32([0, 1, -1, 1e6])), origin="fc"))
    node = graph.nodes[-1]
    quantizer = Quantizer(graph, Scheme({graph.inputs[0]: (-1.0, 1.0)}, "int16", spill=False))
    form, layer = quantizer.format_of(graph.inputs[0]), quantizer.layers[node]
    naive = np.full(k, 32767, np.int64) @ np.full(k, 32767, np.int64)
    assert naive > 2**31 and naive.astype(np.int32) != naive
    whole = quantizer.build()
    b = next(n for n in whole.nodes if n.is_const and n.dtype is DType.i32 and n.shape == (4,)).value.astype(np.int64)
    for extreme in (form.low, form.high):
        sums = layer.weights.astype(np.int64) @ np.full(k, extreme, np.int64) + b
        assert np.abs(sums).max() < 2**31
        np.testing.assert_array_equal(sums.astype(np.int32), sums)
    assert (reach(form, layer.weights.reshape(4, -1)) + np.abs(b) < 2**31).all()
    integers = integer_arithmetic(whole)  # which proves it again from the graph alone
    assert any(n.op == "linear" and n.dtype is DType.i32 for n in integers.nodes)
    x = np.full((1, k), 5.0, np.float32)  # far outside the range: saturates, does not wrap
    np.testing.assert_array_equal(evaluate_graph(integers, [x])[0] > 0, True)


@pytest.mark.parametrize("positive", [True, False])
def test_a_spilled_chain_keeps_more_bits_and_fits(positive: bool) -> None:
    k = 576
    w = RNG.standard_normal((6, k)).astype(np.float32)
    w = np.abs(w) if positive else w
    bias = constant(np.float32([0, 1, -1, 9, 0, 2]))
    graph = graph_of(ops.make("linear", image(1, k), constant(w), bias, origin="fc"))
    node = graph.nodes[-1]
    quantizers = [Quantizer(graph, Scheme({graph.inputs[0]: (-1.0, 1.0)}, "int16", spill=s)) for s in (False, True)]
    layers, forms = [q.layers[node] for q in quantizers], [q.format_of(graph.inputs[0]) for q in quantizers]
    assert [bool(layer.chain) for layer in layers] == [False, True]
    steps = [layer.scales.max() * form.scale for layer, form in zip(layers, forms, strict=True)]
    assert steps[1] <= steps[0] / 4

    quantizer, form, integers = quantizers[1], forms[1], layers[1].weights.astype(np.int64)
    fused = integer_arithmetic(quantizer.build())
    product = next(n for n in fused.nodes if n.op == "linear")
    assert product.dtype is DType.f32 and product.attrs["chain"] >= layers[1].chain
    # The worst input of each channel: the whole sum leaves 32 bits, no part of it does.
    for channel in integers:
        worst = np.where(channel > 0, form.high, form.low)
        assert channel @ worst > 2**31
        parts = np.cumsum(np.concatenate([[0], channel * worst]))
        assert (np.abs(parts[product.attrs["chain"]:] - parts[: -product.attrs["chain"]]) < 2**31 - 65535).all()
        x = (worst * form.scale).astype(np.float32)[None]
        want = (integers @ worst).astype(np.float32) * (layers[1].scales * np.float32(form.scale))
        np.testing.assert_allclose(evaluate_graph(fused, [x])[0][0], want + bias.value, rtol=1e-6)


def test_the_window_that_reaches_farthest_is_found() -> None:
    w = RNG.integers(-9, 9, (3, 4, 5))
    for low, high, size in ((-7, 3, 6), (0, 5, 1), (-2, 2, 20), (-2, 2, 99)):
        windows = np.lib.stride_tricks.sliding_window_view(w.reshape(3, -1), min(size, 20), 1)
        most = np.maximum(windows * low, windows * high).sum(-1), np.minimum(windows * low, windows * high).sum(-1)
        np.testing.assert_array_equal(window_reach(w, low, high, size), np.maximum(most[0], -most[1]).max(1))


def test_integer_arithmetic_computes_the_same() -> None:
    a = relu(conv(image(1, 6, 6, 3), 8, kernel=3, name="a"))
    d = relu(conv(a, 8, kernel=3, groups=8, name="d"))
    y = conv(relu(ops.make("add", conv(d, 8, name="p"), a)), 4, name="y")
    for dtype in ("int8", "int16"):
        _, graph = quantized(graph_of(y), dtype=dtype)
        whole = integer_arithmetic(graph)
        assert sum(n.op == "conv2d" and n.dtype is DType.i32 for n in whole.nodes) == 4
        (want,), (got,) = (evaluate_graph(g, random_inputs(graph)) for g in (graph, whole))
        assert np.abs(got - want).max() < (0.02 if dtype == "int8" else 1e-4) * np.abs(want).max()


@pytest.mark.parametrize("multiplier", [1, 2])
def test_a_depthwise_convolution_reads_a_scale_per_channel(multiplier: int) -> None:
    """As NNCF writes them; a convolution over all channels cannot, and stays float32."""
    x = image(1, 5, 5, 6)
    scale = RNG.uniform(0.01, 0.1, (1, 1, 1, 6)).astype(np.float32)
    zero = constant(np.full((1, 1, 1, 6), 7, np.uint8))
    q = ops.make("quantize", x, constant(scale), zero, to=DType.u8)
    read = ops.make("dequantize", q, constant(scale), zero)

    def product(groups: int) -> Graph:
        shape = (6 * multiplier, 3, 3, 6 // groups)
        w = ops.make("dequantize", constant(RNG.integers(-127, 128, shape, np.int8)),
                     constant(RNG.uniform(0.01, 0.1, (shape[0], 1, 1, 1)).astype(np.float32)),
                     constant(np.zeros((shape[0], 1, 1, 1), np.int8)))
        return graph_of(ops.make("conv2d", read, w, normal(shape[0]), groups=groups, pad=(1, 1, 1, 1)))

    depthwise, dense = product(6), product(1)
    integers = integer_arithmetic(depthwise)
    assert [n.dtype for n in integers.nodes if n.op == "conv2d"] == [DType.i32]
    inputs = random_inputs(depthwise)
    for got, want in zip(evaluate_graph(integers, inputs), evaluate_graph(depthwise, inputs), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert [n.dtype for n in integer_arithmetic(dense).nodes if n.op == "conv2d"] == [DType.f32]


def test_balanced_channels_change_nothing_but_the_channels() -> None:
    x = image(1, 6, 6, 3)
    a = ops.make("silu", conv(x, 8, name="a"), origin="a", label="act")  # not homogeneous: a multiplication
    d = relu(conv(a, 8, kernel=3, groups=8, name="d"))
    graph = graph_of(conv(d, 4, name="p"))
    storage = Storage(graph)
    spread = np.float64([1, 2, 4, 8, 16, 32, 64, 100])
    result = equalised(graph, storage, {n: Channels(spread, spread**2 / 9) for n in storage.sources if n.op != "input"})
    assert {n.name for n in result.factors} == {"act", "d_relu"}
    verify(result.graph)
    np.testing.assert_allclose(spread * result.factors[a], 100.0)  # a depthwise convolution takes any factors
    (want,), (got,) = (evaluate_graph(g, random_inputs(graph)) for g in (graph, result.graph))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    assert sum(n.op == "mul" for n in result.graph.nodes) == 1


def test_only_elementwise_values_are_multiplied() -> None:
    """A mean cannot take the multiplication in: it would become a second, never observed, value to store."""
    x = image(1, 6, 6, 3)
    a = ops.make("silu", conv(x, 8, name="a"), origin="a", label="act")
    mean = ops.make("reduce_mean", a, axes=(1, 2), origin="mean", label="mean")
    graph = graph_of(conv(mean, 4, name="p"))
    storage = Storage(graph)
    spread = np.float64([1, 2, 4, 8, 16, 32, 64, 100])
    assert mean in storage.sources
    result = equalised(graph, storage, {n: Channels(spread, spread**2 / 9) for n in storage.sources if n.op != "input"})
    assert mean not in result.factors
    moved = set(result.node.values())
    assert all(n in moved for n in Storage(result.graph).sources)


@pytest.mark.parametrize(("window", "normalised"), [(4, True), (4, False), (2, True)])
def test_averages_and_maxima_take_factors_back(window: int, normalised: bool) -> None:
    """An exit's head reads few values made of many: multiplying them costs nothing, multiplying a quarter would."""
    a = relu(conv(image(1, 8, 8, 3), 8, name="a"))
    both = (ops.make(op, a, kernel=(window, window), stride=(window, window), origin=op, label=op)
            for op in ("avg_pool2d", "max_pool2d"))
    joined = ops.make("concat", *both, axis=3, origin="joined")
    features = ops.make("reshape", joined, shape=(1, joined.type.size), origin="features")
    if normalised:
        features = ops.make("mul", features, normal(joined.type.size), origin="normalised")
    head = ops.make("linear", features, normal(4, joined.type.size), origin="fc")
    graph = graph_of(conv(a, 4, name="p"), head)
    spread = np.float64([1, 2, 4, 8, 16, 32, 64, 100])
    storage = Storage(graph)
    result = equalised(graph, storage, {a: Channels(spread, spread**2 / 9)})
    verify(result.graph)
    assert set(result.factors) == ({a} if window == 4 and normalised else set())
    observed = {result.node[n] for n in storage.sources}
    assert observed.issuperset(Storage(result.graph).sources)
    for got, want in zip(*(evaluate_graph(h, random_inputs(graph)) for h in (result.graph, graph)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_joined_values_are_balanced_together() -> None:
    """Also where one of them, or all, are read at another size, by another contraction; what comes from a rectifier is
    not, nor what a sum reads, too."""
    x = image(1, 8, 8, 3)
    small = conv(ops.make("max_pool2d", x, kernel=(2, 2), stride=(2, 2)), 16, name="small")
    a = ops.make("silu", conv(x, 16, name="a"), origin="a", label="a")
    b = ops.make("silu", small, origin="b", label="b")
    nearest = np.repeat(np.arange(4, dtype=np.int32), 2)[:, None]
    ones = np.ones((8, 1), np.float32)
    larger = ops.make("resize2d", b, *map(constant, (nearest, ones, nearest, ones)), origin="r", label="r")
    rectified = relu(conv(x, 4, name="c"))
    summed = ops.make("silu", conv(x, 4, name="d"), origin="d", label="d")
    joined = ops.make("concat", a, larger, rectified, summed, axis=3)
    sums = ops.make("add", conv(x, 4, name="s"), summed)
    twice = np.repeat(np.arange(8, dtype=np.int32), 2)[:, None]
    tables = map(constant, (twice, np.ones((16, 1), np.float32)) * 2)
    whole = ops.make("resize2d", joined, *tables, origin="w", label="w")
    graph = graph_of(conv(joined, 5, kernel=3, name="p"), conv(b, 5, name="q"), conv(whole, 5, name="t"), sums)
    storage = Storage(graph)
    spread = np.r_[np.full(15, 4.0), 60.0]
    seen = dict.fromkeys((a, b, larger), Channels(spread, spread**2 / 99))
    little = dict.fromkeys((rectified, summed), Channels(spread[:4] / 40, spread[:4] ** 2 / 9999))
    result = equalised(graph, storage, seen | little)
    assert set(result.factors) == {a, b, larger, whole} == result.balanced
    np.testing.assert_array_equal(result.factors[b], result.factors[larger])
    np.testing.assert_array_equal(result.factors[whole], np.r_[result.factors[a], result.factors[b], np.ones(8)])
    assert (result.factors[a][:15] > 2 * result.factors[a][15]).all()
    verify(result.graph)
    assert sum(n.op == "mul" for n in result.graph.nodes) == 2
    for got, want in zip(*(evaluate_graph(h, random_inputs(graph)) for h in (result.graph, graph)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_smoothing_moves_into_the_normalisation() -> None:
    x = image(1, 5, 8)
    n = ops.make("layer_norm", x, normal(8), normal(8), origin="ln", label="ln")
    q, k = (ops.make("linear", n, normal(8, 8), normal(8), origin=o) for o in "qk")
    graph = graph_of(q, k)
    spread = np.float64([1, 1, 1, 1, 1, 1, 1, 50])
    result = equalised(graph, Storage(graph), {n: Channels(spread, spread**2 / 9)}, norms=(0.5,))
    assert set(result.factors) == {n} and not any(m.op == "mul" for m in result.graph.nodes)
    for g, w in zip(*(evaluate_graph(h, random_inputs(graph)) for h in (result.graph, graph)), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-5)


def test_weights_that_are_all_zero_need_no_smoothing() -> None:
    x = image(1, 5, 8)
    n = ops.make("layer_norm", x, normal(8), normal(8), origin="ln", label="ln")
    graph = graph_of(ops.make("linear", n, constant(np.zeros((4, 8), np.float32)), normal(4), origin="l"))
    spread = np.float64([1, 1, 1, 1, 1, 1, 1, 50])
    assert not equalised(graph, Storage(graph), {n: Channels(spread, spread**2 / 9)}).factors


def test_ranges_in_text() -> None:
    from skive.pipeline import PassManager

    text = """graph @g(%x: f32[1,2]) {
  %w = const [1.0,-0.5] : f32[1,2]
  %y = linear %x, %w : f32[1,1]
  return %y as "y"
}
"""
    graph, _ = PassManager().run(parse_graph(text), "quantize{ranges=x:-1:3}")
    form = next(n for n in graph.nodes if n.op == "quantize")
    assert form.inputs[1].value == np.float32(4 / 255) and form.inputs[2].value == 64
    with pytest.raises(QuantizationError, match="range"):
        PassManager().run(parse_graph(text), "quantize{ranges=other:-1:3}")


@pytest.mark.parametrize("dtype", ["int8", "int16"])
def test_uniform_parts_are_stored_exactly(dtype: str) -> None:
    """What convolutions and sums read, also joined with another value, has an offset per channel; what a mean reads has
    none, and no result moves."""
    x = image(1, 8, 8, 3)
    a, b, c = (ops.make("silu", conv(x, 4, name=n), origin=n, label=n) for n in "abc")
    joined = ops.make("concat", a, b, axis=3)
    y = conv(joined, 5, name="p")
    z = ops.make("add", conv(c, 4, kernel=3, groups=4, name="d"), c)
    e = ops.make("silu", conv(x, 4, name="e"), origin="e", label="e")
    means = ops.make("reduce_mean", e, axes=(1, 2), origin="mean", label="mean")
    doubled = ops.make("add", c, c)
    graph = graph_of(y, z, conv(e, 4, name="q"), means, doubled)
    storage = Storage(graph)
    flat = {n: np.float32([0.111, -0.2, np.nan, 0.777]) for n in (a, b, c, e)}
    plain, _ = quantized(graph, dtype=dtype)
    quantizer, built = quantized(graph, dtype=dtype, flat=flat)
    assert e in storage.stored and quantizer.offset_of(e) is None
    for v in (a, b, c):
        offset, form = quantizer.offset_of(v), quantizer.format_of(v)
        assert offset is not None and offset[2] == 0 and offset.any()
        want = flat[v][[0, 1, 3]]
        np.testing.assert_allclose(form.real(want + offset[[0, 1, 3]]) - offset[[0, 1, 3]], want, atol=1e-6)
    whole = quantizer.offset_of(joined)
    np.testing.assert_array_equal(whole, np.r_[quantizer.offset_of(a), quantizer.offset_of(b)])
    (product,) = (n for n in quantizer.layers if n.inputs[0] is joined)
    shift = product.inputs[1].value.reshape(5, 8).astype(np.float64) @ whole
    np.testing.assert_allclose(plain.bias_of(product) - quantizer.bias_of(product), shift)
    nothing = [np.zeros(x.shape, np.float32)]  # an image all uniform: what a sum reads is exact
    exact = evaluate_graph(graph, nothing)[4]
    quantizer, uniform = quantized(graph, dtype=dtype, flat={c: exact[0, 4, 4] / 2})
    assert np.abs(quantizer.offset_of(c)).max() > 1e-5
    np.testing.assert_allclose(evaluate_graph(uniform, nothing)[4], exact, atol=1e-6)
    inputs = random_inputs(graph)
    for g, w in zip(*(evaluate_graph(h, inputs) for h in (built, graph)), strict=True):
        np.testing.assert_allclose(g, w, atol=0.2 if dtype == "int8" else 1e-3)
    for g, w in zip(*(evaluate_graph(h, inputs) for h in (integer_arithmetic(built), built)), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-4)


def test_factors_of_16_bits_fill_a_power_of_two() -> None:
    """Also where a multiplication balances the channels: it takes one more factor for all of them at no cost."""
    x = image(1, 6, 6, 3)
    a = ops.make("silu", conv(x, 8, name="a"), origin="a", label="act")
    graph = graph_of(conv(a, 8, kernel=3, groups=8, name="d"))
    spread = np.float64([1, 2, 4, 8, 16, 32, 64, 90])
    result = equalised(graph, Storage(graph), {a: Channels(spread, spread**2 / 9)}, bytes_=2, worth=1.0)
    largest = float((spread * result.factors[a]).max()) * 2.0 * 1.6  # with both rooms above what was seen
    assert result.balanced == {a} and 0.99 < largest / fixed(-largest, largest, 16).range[1] <= 1
    for g, w in zip(*(evaluate_graph(h, random_inputs(graph)) for h in (result.graph, graph)), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-5)
