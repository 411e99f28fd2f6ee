"""Every function of math.h and functions.h: vectors against float64 (maximum error in units of the last place over a
dense sweep of all magnitudes), scalars of every type against NumPy."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from batch import CTYPE, Case, check
from driver import compile_library, cpu_isas, pointer
from numpy.typing import NDArray

from skive import ops
from skive.ir import constant

Floats = NDArray[np.float64]
_erf = np.frompyfunc(math.erf, 1, 1)
_erfc = np.frompyfunc(math.erfc, 1, 1)


def _sigmoid(x: Floats) -> Floats:
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, e) / (1 + e)


def _softplus(x: Floats) -> Floats:
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


def _mod(x: Floats) -> Floats:
    return np.mod(x, 3.0)


# name: (C++ text, float64 reference, largest error in ulp, largest absolute error that excuses it)
UNARY: dict[str, tuple[str, Callable[[Floats], Floats], float, float]] = {
    "exp": ("exp_(x)", np.exp, 2, 0),
    "log": ("log_(x)", np.log, 2, 0),
    "expm1": ("expm1_(x)", np.expm1, 3, 0),
    "log1p": ("log1p_(x)", np.log1p, 4, 0),
    "tanh": ("tanh_(x)", np.tanh, 7, 0),
    "erf": ("erf_(x)", lambda x: _erf(x).astype(np.float64), 6, 0),
    # Below -87 sigmoid and silu stay as they are there; 1 + erf and 1 + tanh cancel in the left tail.
    "sigmoid": ("sigmoid(x)", _sigmoid, 4, 1.7e-38),
    "silu": ("silu(x)", lambda x: np.where(x == -np.inf, 0, x * _sigmoid(x)), 4, 1.5e-36),
    "gelu": ("gelu(x)", lambda x: 0.5 * x * _erfc(-x / math.sqrt(2)).astype(np.float64), 6, 1e-6),
    "gelu_tanh": (
        "gelu_tanh(x)",
        lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        8,
        1e-6,
    ),
    "softplus": ("softplus(x)", _softplus, 4, 0),
    "mish": ("mish(x)", lambda x: x * np.tanh(_softplus(x)), 8, 1e-37),
    "elu": ("elu(x, 0.7)", lambda x: np.where(x > 0, x, np.float32(0.7) * np.expm1(np.minimum(x, 0))), 4, 0),
    "selu": ("selu(x, 1.5, 1.25)", lambda x: 1.25 * np.where(x > 0, x, 1.5 * np.expm1(np.minimum(x, 0))), 5, 0),
    "celu": ("celu(x, 0.5)", lambda x: np.where(x > 0, x, 0.5 * np.expm1(np.minimum(x, 0) / 0.5)), 4, 0),
    "sin": ("sin_(x)", np.sin, 3, 0),
    "cos": ("cos_(x)", np.cos, 3, 0),
    "tan": ("tan_(x)", np.tan, 5, 0),
    "asin": ("asin_(x)", np.arcsin, 4, 0),
    "acos": ("acos_(x)", np.arccos, 4, 0),
    "atan": ("atan_(x)", np.arctan, 4, 0),
    "sinh": ("sinh_(x)", np.sinh, 4, 0),
    "cosh": ("cosh_(x)", np.cosh, 3, 0),
    "asinh": ("asinh_(x)", np.arcsinh, 5, 0),
    "acosh": ("acosh_(x)", np.arccosh, 5, 0),
    "atanh": ("atanh_(x)", np.arctanh, 5, 0),
    "sqrt": ("sqrt_(x)", np.sqrt, 0.51, 0),
    "rsqrt": ("rsqrt(x)", lambda x: 1 / np.sqrt(x), 2, 0),
    "reciprocal": ("reciprocal(x)", lambda x: 1 / x, 0.51, 0),
    "softsign": ("softsign(x)", lambda x: x / (1 + np.abs(x)), 2, 1e-38),
    "hard_swish": ("hard_swish_(x)", lambda x: x * np.clip(x / 6 + 0.5, 0, 1), 3, 3e-7),
    "hard_sigmoid": ("hard_sigmoid_(x, 0.25, 0.5)", lambda x: np.clip(x * 0.25 + 0.5, 0, 1), 1, 1e-7),
    "floor": ("floor_(x)", np.floor, 0, 0),
    "ceil": ("ceil_(x)", np.ceil, 0, 0),
    "trunc": ("trunc_(x)", np.trunc, 0, 0),
    "round_even": ("round_even(x)", np.rint, 0, 0),
    "abs": ("abs_(x)", np.abs, 0, 0),
    "neg": ("neg(x)", np.negative, 0, 0),
    "sign": ("sign(x)", np.sign, 0, 0),
    "relu": ("relu(x)", lambda x: np.maximum(x, 0), 0, 0),
    "clip": ("clip(x, -1.0, 6.0)", lambda x: np.clip(x, -1, 6), 0, 0),
    "leaky_relu": ("leaky_relu(x, 0.125)", lambda x: np.where(x < 0, 0.125 * x, x), 0.51, 0),
    "prelu": ("prelu(x, 0.25f)", lambda x: np.where(x < 0, 0.25 * x, x), 0.51, 0),
    "thresholded_relu": ("thresholded_relu(x, 1.0)", lambda x: np.where(x > 1, x, 0), 0, 0),
    "shrink": (
        "shrink(x, 0.5, 1.5)",
        lambda x: np.where(x < -1.5, x + 0.5, np.where(x > 1.5, x - 0.5, x * 0)),
        0.51,
        0,
    ),
    "pow2": ("pow_(x, 2.0f)", lambda x: x * x, 0.51, 0),
    "pow": ("pow_(abs_(x), 1.7f)", lambda x: np.abs(x) ** np.float64(np.float32(1.7)), 1, 0),
    "mod": ("mod_(x, 3.0f)", _mod, 1, 0),
    "min_max": ("min_(max_(x, -2.0f), 3.0f)", lambda x: np.minimum(np.maximum(x, -2), 3), 0, 0),
    "where": (
        "where(and_(less(x, 2.0f), not_(less_equal(x, -2.0f))), x, neg(x))",
        lambda x: np.where((x < 2) & ~(x <= -2), x, -x),
        0,
        0,
    ),
    "is_nan": ("cast<float>(or_(is_nan(x), is_inf(x, true, false)))", lambda x: np.isnan(x) | np.isneginf(x), 0, 0),
}


def sweep() -> NDArray[np.float32]:
    """Every 4,099th float32 by bit pattern, the small integers, and a fine grid around zero."""
    patterns = np.arange(0, 2**32, 4099, dtype=np.uint64).astype(np.uint32).view(np.float32)
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 1.17549435e-38, 3.4e38, -3.4e38], np.float32)
    grid = np.linspace(-20, 20, 400_001, dtype=np.float32)
    return np.concatenate([special, np.arange(-200, 201).astype(np.float32) / 2, grid, patterns])


def ulp_error(got: NDArray[np.float32], want: Floats, excused: float) -> Floats:
    """|got - want| in units of the last place of `want` as a float32; NaN and infinities must agree."""
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = want.astype(np.float32)
        same = (got == rounded) | (np.isnan(got) & np.isnan(rounded))
        unit = np.spacing(np.minimum(np.abs(rounded), np.float32(3.4e38))).astype(np.float64)
        error = np.abs(got.astype(np.float64) - want)
        # Overflow one step early or late counts as one unit.
        edge = np.isinf(got) & (np.abs(want) > 3.4028e38) | np.isinf(rounded) & (np.abs(got) > 3.4028e38)
    return np.where(
        same | (error <= excused),
        np.where(np.isfinite(want) & same, np.minimum(error / unit, 0.5), 0),
        np.where(edge, 1, np.where(np.isfinite(error), error / unit, np.inf)),
    )


@pytest.fixture(scope="module", params=cpu_isas())
def vectors(request: pytest.FixtureRequest, libraries: Path) -> ctypes.CDLL:
    """All functions of UNARY over whole vectors and over vectors of three lanes."""
    lines = ['#include "skive/functions.h"', "using namespace skive;"]
    for name, (text, *_rest) in UNARY.items():
        lines.append(
            f'extern "C" void {name}_(const float* in, float* out, ptrdiff_t n) {{\n'
            f"  ptrdiff_t i = 0;\n  auto f = [](auto x) {{ return {text}; }};\n"
            f"  for (; i + kLanes <= n; i += kLanes) store(out + i, f(load<kLanes>(in + i)));\n"
            f"  for (; i + 3 <= n; i += 3) store(out + i, f(load<3>(in + i)));\n"
            f"  for (; i < n; ++i) out[i] = static_cast<float>(f(in[i]));\n}}"
        )
    return compile_library("\n".join(lines), request.param, libraries)


@pytest.mark.parametrize("name", UNARY)
def test_vector(vectors: ctypes.CDLL, name: str) -> None:
    _, reference, limit, excused = UNARY[name]
    x = sweep()
    y = np.empty_like(x)
    getattr(vectors, name + "_")(pointer(x), pointer(y), ctypes.c_ssize_t(x.size))
    with np.errstate(all="ignore"):
        want = np.asarray(reference(x.astype(np.float64)), np.float64)
        if name == "gelu_tanh":  # a NaN of -inf: 0.5 x (1 + tanh) is -inf times 0
            want = np.where(np.isneginf(x), np.nan, want)
    error = ulp_error(y, want, excused)
    worst = int(np.argmax(error))
    assert error[worst] <= limit, f"{name}({x[worst]!r}) = {y[worst]!r}, not {want[worst]!r}: {error[worst]:.2f} ulp"


INTEGERS = [np.int8, np.uint8, np.int16, np.int32, np.uint32, np.int64, np.uint64]


def _divide(a: int, b: int) -> int:
    return 0 if b == 0 else abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def _shift(a: int, b: int, bits: int, left: bool) -> int:
    if not 0 <= b < bits:
        return -1 if a < 0 and not left else 0
    return a << b if left else a >> b


@pytest.mark.parametrize("isa", ["generic"])
def test_integers(isa: str, tmp_path: Path) -> None:
    """Wrapping arithmetic and the defined results of division by zero, also under UBSan's rules."""
    rng = np.random.default_rng(19)
    cases = []
    for dtype in INTEGERS:
        info, ctype, bits = np.iinfo(dtype), CTYPE[np.dtype(dtype)], np.dtype(dtype).itemsize * 8
        edge = [info.min, info.max, 0, 1, 2, info.max - 1, info.min + 1, 7, 3, 31, 8] + ([-1, -3] if info.min else [])
        a = np.array([v for v in edge for _ in edge] + list(rng.integers(info.min, info.max, 50, dtype)), dtype)
        b = np.array(edge * len(edge) + list(rng.integers(info.min, info.max, 50, dtype)), dtype)
        pairs = [(int(p), int(q)) for p, q in zip(a, b, strict=True)]

        def wrapped(values: list[int], n: int = bits, to: type = dtype) -> NDArray[np.generic]:
            return np.array([v & (2**n - 1) for v in values], np.dtype(f"u{n // 8}")).view(to)

        rows = {
            "add(p, q)": [p + q for p, q in pairs],
            "sub(p, q)": [p - q for p, q in pairs],
            "mul(p, q)": [p * q for p, q in pairs],
            "div_(p, q)": [_divide(p, q) for p, q in pairs],
            "neg(p)": [-p for p, _ in pairs],
            "abs_(p)": [abs(p) for p, _ in pairs],
            "mod_(p, q)": [p % q if q else 0 for p, q in pairs],
            "fmod_(p, q)": [p - q * _divide(p, q) if q else 0 for p, q in pairs],
            "min_(p, q)": [min(t) for t in pairs],
            "max_(p, q)": [max(t) for t in pairs],
            "sign(p)": [(p > 0) - (p < 0) for p, _ in pairs],
            "relu(p)": [max(p, 0) for p, _ in pairs],
            "bit_and(p, q)": [p & q for p, q in pairs],
            "bit_or(p, q)": [p | q for p, q in pairs],
            "bit_xor(p, q)": [p ^ q for p, q in pairs],
            "bit_not(p)": [~p for p, _ in pairs],
            "shift_left(p, q)": [_shift(p, q, bits, True) for p, q in pairs],
            "shift_right(p, q)": [_shift(p, q, bits, False) for p, q in pairs],
            "clip(p, 1, 6)": [min(max(p, 1), 6) for p, _ in pairs],
            "where(greater(p, q), p, q)": [max(t) for t in pairs],
            "pow_(p, min_(q, static_cast<decltype(q)>(5)))": [
                p ** min(q, 5) if q >= 0 else (p ** (q & 1) if abs(p) == 1 else 0) for p, q in pairs
            ],
            "pow_(p, bit_and(q, static_cast<decltype(q)>(7)))": [p ** (q & 7) for p, q in pairs],
        }
        for text, want in rows.items():
            operands = f"[[maybe_unused]] {ctype} p = x0[i], q = x1[i];"
            loop = f"for (int i = 0; i < {a.size}; ++i) {{ {operands} y0[i] = {text}; }}"
            cases.append(Case(loop, [a, b], [wrapped(want)], parts=(1,)))
    check(cases, ["functions.h"], isa, tmp_path)


@pytest.mark.parametrize("isa", ["generic"])
def test_log2_fixed(isa: str, tmp_path: Path) -> None:
    """Against its meaning in the op table, which stays below log2 by a unit of 2^-24 and a little."""
    rng = np.random.default_rng(5)
    powers = 2 ** np.arange(31, dtype=np.int64)
    others = rng.integers(-(2**31), 2**31, 4000), 2 ** rng.uniform(0, 31, 4000)
    x = np.concatenate([powers, powers - 1, powers + 1, *others])
    x = np.clip(x, -(2**31), 2**31 - 1).astype(np.int32)
    want = ops.evaluate(ops.make("log2_fixed", constant(x)), [x])
    exact = np.log2(np.maximum(x, 1).astype(np.float64)) * 2**24
    assert ((want <= exact) & (want > exact - 1.02)).all() and (want[:31] == np.arange(31) * 2**24).all()
    check([Case(f"for (int i = 0; i < {x.size}; ++i) y0[i] = log2_fixed(x0[i]);", [x], [want], parts=(1,))],
          ["functions.h"], isa, tmp_path)


@pytest.mark.parametrize("isa", ["generic"])
def test_cast(isa: str, tmp_path: Path) -> None:
    x = np.array(
        [
            0,
            -0.5,
            1.9,
            -1.9,
            127.9,
            128,
            -129,
            300,
            3e9,
            -3e9,
            1e10,
            9.3e18,
            1.8e19,
            -1e19,
            1e30,
            np.inf,
            -np.inf,
            np.nan,
            65535,
            2147483648.0,
        ],
        np.float32,
    )
    cases = []
    for source in (x, x.astype(np.float64)):
        for dtype in [*INTEGERS, np.uint16]:
            wide = []
            for v in source.astype(np.float64):
                inside = -(2.0**63) <= v < (2.0**64 if dtype is np.uint64 else 2.0**63)
                wide.append((int(v) if inside else -(2**63)) & (2**64 - 1))
            want = np.array(wide, np.uint64).astype(np.dtype(f"u{np.dtype(dtype).itemsize}")).view(dtype)
            ctype = CTYPE[np.dtype(dtype)]
            cases.append(
                Case(f"for (int i = 0; i < {x.size}; ++i) y0[i] = cast<{ctype}>(x0[i])", [source], [want], parts=(1,))
            )
        cases.append(
            Case(f"for (int i = 0; i < {x.size}; ++i) y0[i] = cast<bool>(x0[i])", [source], [source != 0], parts=(1,))
        )
    i = np.array([0, -1, 300, -129, 2**31 - 1, 2**40], np.int64)
    for dtype in INTEGERS:
        cases.append(
            Case(
                f"for (int i = 0; i < {i.size}; ++i) y0[i] = cast<{CTYPE[np.dtype(dtype)]}>(x0[i])",
                [i],
                [i.astype(dtype)],
                parts=(1,),
            )
        )
    check(cases, ["functions.h"], isa, tmp_path)
