"""The steps of recurrent layers: with 8-bit weights equal to the op table bit for bit, on every instruction set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from batch import Case, angle, check
from driver import INTEGER_ISA_FLAGS, cpu_isas

from skive import ops, pack
from skive.ir import constant

# T, N, H; rows of 1024 floats lie a page apart.
SHAPES = [(1, 1, 1), (4, 1, 16), (4, 1, 17), (3, 5, 33), (6, 1, 130), (2, 3, 1024)]


def f32(rng: np.random.Generator, *shape: int, spread: float = 1.0) -> np.ndarray:
    return (rng.standard_normal(shape) * spread).astype(np.float32)


@pytest.mark.parametrize("isa", cpu_isas(INTEGER_ISA_FLAGS))
def test_equals_the_op_table(isa: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(21)
    whole: list[Case] = []
    real: list[Case] = []
    for t, n, h in SHAPES:
        for name, gates in (("lstm", 4), ("gru", 3)):
            pre = f32(rng, t, n, gates * h, spread=2)
            pre.flat[::97] *= 1e4  # activations that are flat there
            candidate = [f32(rng, h)] if name == "gru" else []
            states = [f32(rng, n, h) for _ in range(2 if name == "lstm" else 1)]
            states[0][-1] = (0, 1e-38)[t % 2]  # a row without a largest value, or with none that has a reciprocal
            r = rng.integers(-127, 128, (gates * h, h)).astype(np.int8)
            scale = rng.uniform(0.5, 2, gates * h).astype(np.float32) / np.float32(127 * h**0.5)
            node = ops.make(f"quantized_{name}", *map(constant, (pre, r, scale, *candidate, *states)))
            want = ops.evaluate(node, [i.value for i in node.inputs])
            block = pack.conv2d_block(gates * h, isa, n, element_size=1, depth=h)
            padded = np.pad(r, ((0, 0), (0, -h % 4)))
            weights = pack.pack_conv2d_u8(padded[:, None, None, :], block)
            bias = pack.pack_bias_i32(None, padded, 128, block)
            kernel = angle(f"quantized_{name}", t, n, h, block)
            operands = [pre, weights, bias, scale, *candidate, *states]
            names = ", ".join(f"x{i}" for i in range(len(operands)))
            whole.append(Case(f"{kernel}::run({names}, y0, scratch, part)", operands, [want], kernel))

            weight = r.astype(np.float32) * scale[:, None]
            node = ops.make(f"{name}_steps", *map(constant, (pre, weight, *candidate, *states)))
            want = ops.evaluate(node, [i.value for i in node.inputs])
            panels = np.split(weight, [2 * h]) if name == "gru" else [weight]
            packed = np.concatenate([pack.pack_gates(p, n, isa) for p in panels])
            kernel = angle(f"{name}_steps", t, n, h)
            operands = [pre, packed, *candidate, *states]
            names = ", ".join(f"x{i}" for i in range(len(operands))) + (", nullptr" if name == "lstm" else "")
            real.append(Case(f"{kernel}::run({names}, y0, scratch, part)", operands, [want], kernel, atol=1e-5))
    check(whole, ["rnn_integer.h"], isa, tmp_path)
    check(real, ["rnn.h"], isa, tmp_path)


def test_the_activations_are_close_to_the_real_ones() -> None:
    from skive.ops.recurrence import _exact_sigmoid, _exact_tanh

    x = np.concatenate([np.linspace(-100, 100, 200_001), [np.inf, -np.inf]]).astype(np.float32)
    real = x.astype(np.float64)
    with np.errstate(over="ignore"):
        assert np.abs(_exact_sigmoid(x) - 1 / (1 + np.exp(-real))).max() < 3e-7
    assert np.abs(_exact_tanh(x) - np.tanh(real)).max() < 5e-7
