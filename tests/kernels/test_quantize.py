"""Integer lanes and the quantization functions of math.h: vectors of every width and scalars equal NumPy bit for
bit, with ties, saturation, NaN, infinities and factors of every magnitude."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from batch import CTYPE, Case, angle, check
from driver import cpu_features, cpu_isas
from numpy.typing import NDArray
from test_map import BROADCASTS, broadcast_strides

NARROW = [np.int8, np.uint8, np.int16, np.uint16]
LANES = [*NARROW, np.int32]

# `each(n, f)`: whole vectors and one of three lanes in turn over [0, n); `each_width`: vectors of 1, 2, ... kLanes.
_EACH = """
template <class F, int... N>
void in_turn(Index<N...>, ptrdiff_t n, const F& f) {
  ptrdiff_t i = 0;
  const auto step = [&](auto lanes) {
    constexpr int width = decltype(lanes)::count;
    if (i + width > n) return;
    f(i, lanes);
    i += width;
  };
  while (i + kLanes <= n) (step(Lanes<N + 1>{}), ...);
  while (i < n) step(Lanes<1>{});
}
template <class F>
void each(ptrdiff_t n, const F& f) {
  in_turn(Index<kLanes - 1, 2>{}, n, f);
}
template <class F>
void each_width(ptrdiff_t n, const F& f) {
  in_turn(Indices<kLanes>{}, n, f);
}
"""


def ctype(dtype: type) -> str:
    return CTYPE[np.dtype(dtype)]


def over_lanes(n: int, text: str, loop: str = "each") -> str:
    """A loop over vectors of several widths; `N` and `i` may stand in `text`."""
    return f"{loop}({n}, [&](ptrdiff_t i, auto lanes) {{ constexpr int N = decltype(lanes)::count; {text}; }})"


def saturate(v: NDArray[np.float32], zero: NDArray[np.generic], dtype: type) -> NDArray[np.generic]:
    """round_even(v) + zero within the range of `dtype`, NaN to the lowest value, in integers of any size."""
    info = np.iinfo(dtype)
    finite = np.clip(np.nan_to_num(v, nan=-1e9, posinf=1e9, neginf=-1e9).astype(np.float64), -1e9, 1e9)
    return np.clip(np.rint(finite).astype(np.int64) + zero.astype(np.int64), info.min, info.max).astype(dtype)


def floats(rng: np.random.Generator) -> NDArray[np.float32]:
    """Ties and their neighbours, every magnitude, and the special values."""
    half = np.arange(-700, 700, dtype=np.float32) / 2
    near = np.concatenate([half, np.nextafter(half, np.float32(np.inf)), np.nextafter(half, np.float32(-np.inf))])
    patterns = rng.integers(0, 2**32, 4000, dtype=np.uint64).astype(np.uint32).view(np.float32)
    special = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 3.4e38, -3.4e38, 1e-45], np.float32)
    wide = (rng.standard_normal(1000) * 40000).astype(np.float32)
    return np.concatenate([near, patterns, special, wide])


def integers(rng: np.random.Generator) -> NDArray[np.int32]:
    small = np.arange(-600, 600)
    wide = rng.integers(-(2**31), 2**31, 2000)
    near = rng.integers(-(2**17), 2**17, 2000)
    return np.concatenate([small, wide, near, [2**31 - 1, -(2**31), 2**24 + 1]]).astype(np.int32)


HEADERS = ["row.h"]


@pytest.mark.parametrize("isa", cpu_isas())
def test_quantize(isa: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    x = floats(rng)
    cases = []
    for dtype in NARROW:
        info, t = np.iinfo(dtype), ctype(dtype)
        for scale in (1.0, 0.5, 0.1, 3.1e-5, 7.7e33, 1e-40):
            zero = int(rng.integers(info.min, info.max, endpoint=True))
            with np.errstate(all="ignore"):
                want = saturate(x / np.float32(scale), np.array(zero), dtype)
            call = f"quantize<{t}>(load<N>(x0 + i), {scale!r}f, {zero})"
            cases.append(Case(over_lanes(x.size, f"store(y0 + i, {call})"), [x], [want]))
            call = f"quantize<{t}>(x0[i], {scale!r}f, {zero})"
            cases.append(Case(f"for (int i = 0; i < {x.size}; ++i) y0[i] = {call}", [x], [want]))
        scales = np.exp(rng.uniform(-20, 20, x.size)).astype(np.float32)
        zeros = rng.integers(info.min, info.max, x.size, endpoint=True).astype(dtype)
        with np.errstate(all="ignore"):
            want = saturate(x / scales, zeros, dtype)
        call = f"quantize<{t}>(load<N>(x0 + i), load<N>(x1 + i), load<N>(x2 + i))"
        cases.append(Case(over_lanes(x.size, f"store(y0 + i, {call})"), [x, scales, zeros], [want]))
        call = f"quantize<{t}>(x0[i], x1[i], x2[i])"
        cases.append(Case(f"for (int i = 0; i < {x.size}; ++i) y0[i] = {call}", [x, scales, zeros], [want]))
    check(cases, HEADERS, isa, tmp_path, prelude=_EACH)


@pytest.mark.parametrize("isa", cpu_isas())
def test_requantize(isa: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    x, f = integers(rng), floats(rng)
    cases = []
    for dtype in NARROW:
        info, t = np.iinfo(dtype), ctype(dtype)
        for values in (x, f):
            factors = np.exp(rng.uniform(-25, 25, values.size)).astype(np.float32)
            factors[::7] = 0.5
            zeros = rng.integers(info.min, info.max, values.size, endpoint=True).astype(dtype)
            with np.errstate(all="ignore"):
                want = saturate(values.astype(np.float32) * factors, zeros, dtype)
            call = f"requantize<{t}>(load<N>(x0 + i), load<N>(x1 + i), load<N>(x2 + i))"
            cases.append(Case(over_lanes(values.size, f"store(y0 + i, {call})"), [values, factors, zeros], [want]))
            call = f"requantize<{t}>(x0[i], x1[i], x2[i])"
            loop = f"for (int i = 0; i < {values.size}; ++i) y0[i] = {call}"
            cases.append(Case(loop, [values, factors, zeros], [want]))
            with np.errstate(all="ignore"):
                want = saturate(values.astype(np.float32) * np.float32(0.25), np.array(3), dtype)
            call = f"requantize<{t}>(load<N>(x0 + i), splat<N>(0.25f), splat<N>({t}{{3}}))"
            cases.append(Case(over_lanes(values.size, f"store(y0 + i, {call})"), [values], [want]))
    check(cases, HEADERS, isa, tmp_path, prelude=_EACH)


@pytest.mark.parametrize("isa", cpu_isas())
def test_scaled_sum(isa: str, tmp_path: Path) -> None:
    """The product of the converted sum where the sum is not negative, and nothing positive below."""
    rng = np.random.default_rng(5)
    sums = np.concatenate([np.arange(-300, 300), rng.integers(-(2**23), 2**23, 4000), [-(2**23), 2**23 - 1]])
    factors = np.exp(rng.uniform(-30, 30, sums.size)).astype(np.float32)
    # Products next to ties: the factor is that of the integer k + 1/2 over the sum, rounded.
    near = np.maximum(rng.integers(1, 2**23, sums.size), 1)
    ties = ((rng.integers(0, 255, sums.size) + 0.5) / near).astype(np.float32)
    sums, factors = np.concatenate([sums, near]).astype(np.int32), np.concatenate([factors, ties])
    shifted, offsets = (sums + 0x4B000000).astype(np.int32), factors * np.float32(-(2.0**23))
    product = sums.astype(np.float32) * factors
    call = "scaled_sum(load<N>(x0 + i), load<N>(x1 + i), load<N>(x2 + i))"
    kept = np.where(sums >= 0, product, np.float32(0))
    byte = saturate(product, np.array(0), np.uint8)
    given = [shifted, factors, offsets]
    cases = [
        Case(over_lanes(sums.size, f"store(y0 + i, vmax(splat<N>(0.0f), {call}))"), given, [kept]),
        Case(over_lanes(sums.size, f"store(y0 + i, rounded<uint8_t>({call}, 0))"), given, [byte]),
    ]
    check(cases, [*HEADERS, "tile.h"], isa, tmp_path, prelude=_EACH)


@pytest.mark.parametrize("isa", cpu_isas())
def test_requantize_fixed(isa: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    x = integers(rng)
    cases = []
    for dtype in (*NARROW, np.int32):
        info, t = np.iinfo(dtype), ctype(dtype)
        multipliers = rng.integers(-(2**31), 2**31, x.size).astype(np.int32)
        multipliers[:8] = [2**31 - 1, -(2**31), 0, 1, -1, 2**30, 3, 5]
        shifts = rng.integers(1, 63, x.size).astype(np.int32)
        zeros = rng.integers(info.min, info.max, x.size, endpoint=True).astype(dtype)

        def fixed(*operands: NDArray[np.generic], to: type = dtype) -> NDArray[np.generic]:
            v, m, s, z = (o.astype(np.int64) for o in operands)
            wide = ((v * m + (np.int64(1) << (s - 1))) >> s) + z
            return np.clip(wide, np.iinfo(to).min, np.iinfo(to).max).astype(to)

        inputs = [x, multipliers, shifts, zeros]
        want = fixed(*inputs)
        call = f"requantize_fixed<{t}>(load<N>(x0 + i), load<N>(x1 + i), load<N>(x2 + i), load<N>(x3 + i))"
        cases.append(Case(over_lanes(x.size, f"store(y0 + i, {call})"), inputs, [want]))
        call = f"requantize_fixed<{t}>(x0[i], x1[i], x2[i], x3[i])"
        cases.append(Case(f"for (int i = 0; i < {x.size}; ++i) y0[i] = {call}", inputs, [want]))
        for multiplier, shift in ((1518500250, 31), (2**31 - 1, 1), (-(2**31), 62), (1, 40)):
            m, s = np.array(multiplier), np.array(shift)
            call = f"requantize_fixed<{t}>(load<N>(x0 + i), int32_t({multiplier}ll), {shift}, {info.max})"
            want = fixed(x, m, s, np.array(info.max))
            cases.append(Case(over_lanes(x.size, f"store(y0 + i, {call})"), [x], [want]))
    check(cases, HEADERS, isa, tmp_path, prelude=_EACH)


@pytest.mark.parametrize("isa", cpu_isas())
def test_dequantize(isa: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    cases = []
    for dtype in LANES:
        info = np.iinfo(dtype)
        q = np.concatenate([[info.min, info.max, 0, 1], rng.integers(info.min, info.max, 3000, endpoint=True)])
        q = q.astype(dtype)
        zeros = rng.permutation(q)
        scales = np.exp(rng.uniform(-40, 40, q.size)).astype(np.float32)
        with np.errstate(over="ignore"):
            want = (q.astype(np.int32) - zeros.astype(np.int32)).astype(np.float32) * scales
        inputs = [q, scales, zeros]
        call = "dequantize(load<N>(x0 + i), load<N>(x1 + i), load<N>(x2 + i))"
        cases.append(Case(over_lanes(q.size, f"store(y0 + i, {call})"), inputs, [want]))
        loop = f"for (int i = 0; i < {q.size}; ++i) y0[i] = dequantize(x0[i], x1[i], x2[i])"
        cases.append(Case(loop, inputs, [want]))
    check(cases, HEADERS, isa, tmp_path, prelude=_EACH)


@pytest.mark.parametrize("isa", cpu_isas())
def test_integer_lanes(isa: str, tmp_path: Path) -> None:
    """Widening loads, narrowing stores, wrapping arithmetic, comparisons and casts, equal to the scalars."""
    rng = np.random.default_rng(7)
    cases = []
    for dtype in LANES:
        info = np.iinfo(dtype)
        edge = np.array([info.min, info.max, 0, 1, info.max - 1], np.int64)
        a = np.concatenate([edge, edge, rng.integers(info.min, info.max, 500, endpoint=True)]).astype(dtype)
        b = np.concatenate([edge, edge[::-1], rng.integers(info.min, info.max, 500, endpoint=True)]).astype(dtype)
        p, q = a.astype(np.int64), b.astype(np.int64)
        rows = {
            "p": p,
            "add(p, q)": p + q,
            "sub(p, q)": p - q,
            "mul(p, q)": p * q,
            "mul(p, 3)": p * 3,
            "neg(p)": -p,
            "abs_(p)": abs(p),
            "sign(p)": np.sign(p),
            "min_(p, q)": np.minimum(p, q),
            "max_(p, splat<N>(int16_t{5}))": np.maximum(p, 5),
            "relu(p)": np.maximum(p, 0),
            "clip(p, -3, 100)": np.clip(p, -3, 100),
            "bit_and(p, q)": p & q,
            "bit_or(p, q)": p | q,
            "bit_xor(p, 5)": p ^ 5,
            "bit_not(p)": ~p,
            "shift_left(p, 3)": p << 3,
            "shift_right(p, 2)": p >> 2,
            "shift_right(p, bit_and(q, 7))": p >> (q & 7),
            "where(less(p, q), p, q)": np.minimum(p, q),
            "where(greater_equal(p, q), 7, q)": np.where(p >= q, 7, q),
            "where(or_(equal_(p, 1), not_equal_(p, q)), p, 9)": np.where((p == 1) | (p != q), p, 9),
            "cast<int32_t>(less_equal(p, 4))": p <= 4,
            "cast<int8_t>(p)": p.astype(np.int8),
            "cast<uint16_t>(p)": p.astype(np.uint16),
            "cast<int32_t>(cast<bool>(p))": p != 0,
            "bits(from_bits(p))": p,
        }  # fmt: skip
        for text, want in rows.items():
            operands = "[[maybe_unused]] const auto p = load<N>(x0 + i), q = load<N>(x1 + i)"
            loop = over_lanes(a.size, f"{operands}; store(y0 + i, {text})", "each_width" if text == "p" else "each")
            cases.append(Case(loop, [a, b], [np.asarray(want, np.int64).astype(np.int32).astype(dtype)]))
        loop = over_lanes(a.size, "store(y0 + i, cast<float>(load<N>(x0 + i)))")
        cases.append(Case(loop, [a], [a.astype(np.int32).astype(np.float32)]))
        sums = [np.asarray(v).astype(np.int32) for v in (p[:7].sum(), p[:7].max(), p[:7].min())]
        for name, want in zip(("hsum", "hmax", "hmin"), sums, strict=True):
            join = {"hsum": "add", "hmax": "max_", "hmin": "min_"}[name]
            parts = [f"{name}(load<1>(x0))", f"{name}(load<3>(x0 + 1))", f"{name}(load<3>(x0 + 4))"]
            text = f"y0[0] = {join}({join}({parts[0]}, {parts[1]}), {parts[2]})"
            cases.append(Case(text, [a[:7]], [want.reshape(1)]))
    x = floats(rng)
    x = x[np.abs(x) < 2.0**31]
    loop = over_lanes(x.size, "store(y0 + i, round_to_int(load<N>(x0 + i)))")
    cases.append(Case(loop, [x], [np.rint(x.astype(np.float64)).astype(np.int32)]))
    check(cases, HEADERS, isa, tmp_path, prelude=_EACH)



# C++ text of a, b; element types of a, b and of the result; meaning.
_F32 = np.float32
MIXED: list[tuple[str, tuple[type, type, type], Callable[..., NDArray[np.generic]]]] = [
    (
        "quantize<uint8_t>(relu(add(dequantize(a, 0.5f, 7), dequantize(b, 0.25f, -3))), 0.75f, 11)",
        (np.uint8, np.int8, np.uint8),
        lambda a, b: saturate(
            np.maximum((a.astype(_F32) - 7) * _F32(0.5) + (b.astype(_F32) + 3) * _F32(0.25), 0) / _F32(0.75),
            np.array(11), np.uint8),
    ),
    ("requantize<int8_t>(a, b, -5)", (np.int32, _F32, np.int8),
     lambda a, b: saturate(a.astype(_F32) * b, np.array(-5), np.int8)),
    ("quantize<int16_t>(a, 0.125f, b)", (_F32, np.int16, np.int16),
     lambda a, b: saturate(a / _F32(0.125), b, np.int16)),
    ("dequantize(a, b, 9)", (np.uint16, _F32, _F32), lambda a, b: (a.astype(_F32) - 9) * b),
    ("max_(a, b)", (np.uint8, np.uint8, np.uint8), np.maximum),
    ("add(a, b)", (np.int32, np.int16, np.int32), lambda a, b: a + b),
    ("sub(a, b)", (np.int8, np.int8, np.int8), lambda a, b: a - b),
    ("cast<int16_t>(mul(a, b))", (np.uint16, np.int16, np.uint16), lambda a, b: (a * b).astype(np.uint16)),
]  # fmt: skip


@pytest.mark.parametrize("isa", cpu_isas())
def test_maps_of_mixed_types(isa: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(8)

    def draw(shape: tuple[int, ...], dtype: type) -> NDArray[np.generic]:
        if dtype is _F32:
            return np.asarray(np.round(rng.standard_normal(shape) * 64) / 16).astype(dtype)
        span = np.iinfo(dtype if dtype is not np.int32 else np.int16)
        return np.asarray(rng.integers(span.min, span.max, shape, endpoint=True)).astype(dtype)

    cases = []
    shapes = [*BROADCASTS, ((3, 200), (200,)), ((70, 67), (70, 67)), ((1, 640), (1,))]
    for n, (full, other) in enumerate(shapes):
        tags = [angle("Shape", *full)]
        tags += [angle("Strides", *broadcast_strides(s, full)) for s in (full, other)]
        for text, (p, q, out), meaning in MIXED[n % 2 :: 2]:
            a, b = draw(full, p), draw(other, q)
            with np.errstate(over="ignore"):
                want = np.broadcast_to(meaning(a, b), full).astype(out)
            call = f"{angle('vmap', *tags)}::run(y0, part, [](auto a, auto b) {{ return {text}; }}, x0, x1)"
            cases.append(Case(call, [a, b], [want]))
    x = draw((6, 90), np.uint8)
    into = np.full((6, 150), 77, np.uint8)
    into[:, 5:95] = ~x
    invert, real = "[](auto a) { return bit_not(a); }", "[](auto a) { return dequantize(a, 0.5f, 1); }"
    slice_of = f"vmap_to<Shape<6, 90>, Strides<150, 1>, Strides<90, 1>>::run(y0 + 5, part, {invert}, x0)"
    every_other = f"vmap<Shape<6, 45>, Strides<90, 2>>::run(y0, part, {real}, x0)"
    cases += [
        Case(slice_of, [x], [into]),
        Case(every_other, [x], [(x[:, ::2].astype(_F32) - 1) * _F32(0.5)]),
    ]
    check(cases, ["map.h"], isa, tmp_path)


@pytest.mark.parametrize("isa", cpu_isas())
@pytest.mark.parametrize("permutation", ["words", "bytes"])
def test_lookup(isa: str, permutation: str, tmp_path: Path) -> None:
    """Every entry of a table, every remainder, in place, strided, and entries wider than a byte."""
    flags: tuple[str, ...] = ("-O2",)
    if permutation == "bytes":
        if isa != "avx512" or "avx512vbmi" not in cpu_features():
            pytest.skip("permutations of bytes are AVX-512 VBMI")
        flags = ("-O2", "-mavx512vbmi")
    rng = np.random.default_rng(10)
    cases = []
    for n, shape in enumerate([(1,), (63,), (64,), (5, 200), (40, 33), (4097,), (2, 3, 1)]):
        x = rng.integers(0, 256, shape).astype(np.uint8)
        for dtype in (np.uint8, np.int8, np.int16, np.float32)[n % 2 :: 2] if n else (np.uint8, np.int8):
            table = rng.integers(-(2**7), 2**7, 256).astype(dtype)
            source = x if n % 2 else x.view(np.int8)
            tags = f"{angle('Shape', *shape)}, {angle('Strides', *broadcast_strides(shape, shape))}"
            cases.append(Case(f"lookup<{tags}>::run(y0, part, x1, x0)", [source, table], [table[x]]))
    x, table = rng.integers(0, 256, (6, 90)).astype(np.uint8), rng.permutation(256).astype(np.uint8)
    into = np.full((6, 150), 77, np.uint8)
    into[:, 5:95] = table[x]
    slice_of = "lookup_to<Shape<6, 90>, Strides<150, 1>, Strides<90, 1>>::run(y0 + 5, part, x1, x0)"
    cases.append(Case(slice_of, [x, table], [into]))
    cases.append(Case("lookup<Shape<6, 45>, Strides<90, 2>>::run(y0, part, x1, x0)", [x, table], [table[x[:, ::2]]]))
    in_place = "__builtin_memcpy(y0, x0, 540); lookup<Shape<540>, Strides<1>>::run(y0, part, x1, y0)"
    cases.append(Case(in_place, [x, table], [table[x]], parts=(1,)))
    check(cases, ["map.h"], isa, tmp_path, flags=flags)
