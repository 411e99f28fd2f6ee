"""The weights of a contraction as integers, such that no input can make a sum leave 32 bits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from skive.ir import Node
from skive.passes.integer_arithmetic import WIDEST, may_spill, window_reach
from skive.passes.quantize.formats import Format
from skive.types import DType

INT32 = 2**31 - 1
# A chain of 16-bit products is spilled after so many, if at all. A spill takes about as long as SPILL products
# (measured: 6 on AVX-512, 2 to 6 on AVX2); for PRICE dB less noise a layer may take one per cent more time.
CHAINS = (1024, 512, 256, 128, 64, 32)
SPILL = 6
PRICE = 0.02


@dataclass
class Layer:
    """A contraction in fixed point. `weights` are integers, `scales` per output channel or one."""

    node: Node
    source: Node  # whose stored form it reads
    weights: np.ndarray
    scales: np.ndarray  # [OC] float32
    weight_bits: int = 8
    chain: int = 0  # products that are added before the sum is spilled, 0: all of them

    @property
    def real_weights(self) -> np.ndarray:
        return self.weights.astype(np.float32) * self.shaped(self.scales)

    def shaped(self, per_channel: np.ndarray) -> np.ndarray:
        """[OC] as [OC, 1, ...], which broadcasts over the weights."""
        return per_channel.reshape(-1, *(1,) * (self.weights.ndim - 1))


def reach(form: Format, weights: np.ndarray) -> np.ndarray:
    """[OC] how far from 0 the sum of weights [OC, K] times any activations in `form` can come."""
    low, high = form.low - form.zero, form.high - form.zero
    up, down = np.maximum(weights, 0).sum(1), np.maximum(-weights, 0).sum(1)
    return np.maximum(high * up - low * down, high * down - low * up)


class Weights:
    """The float weights [OC, ...] of the contraction `node`, and the integers that stand for them.

    `per_channel`: each output channel has its own scale. Below, `form` is the format of what the contraction
    reads and `bias` [OC] what is added to its sums.
    """

    def __init__(self, node: Node, per_channel: bool):
        self.node = node
        self._per_channel = per_channel
        self._rows = node.inputs[1].value.reshape(node.inputs[1].shape[0], -1)  # [OC, products of a sum]
        self._reach: dict[int, np.ndarray] = {}

    @cached_property
    def _largest(self) -> np.ndarray:
        return np.abs(self._rows).max(1, initial=0)

    @cached_property
    def _total(self) -> np.ndarray:
        return np.abs(self._rows).sum(1, dtype=np.float64)

    def chain(self, form: Format, bias: np.ndarray, power: float, spill: bool) -> tuple[int, float]:
        """(after how many 16-bit products to spill, 0 for never; dB of relative noise and of price that this means).

        `power`: mean square of what is read, 0 if unknown; without `spill` sums are not spilled.
        """
        largest = max(abs(form.low), abs(form.high)) * form.scale
        power = power or (largest / 4) ** 2 or 1.0
        square = max(float(np.mean(np.square(self.node.inputs[1].value))), 1e-30)
        count = self._rows.shape[1]
        allowed = CHAINS if spill and may_spill(self.node) else ()
        best = (0, math.inf)
        for n in (0, *(c for c in allowed if c < count)):
            step = self._steps(form, bias, n)
            total = form.scale**2 / power + float(np.mean(step**2)) / square
            price = PRICE * 100 * SPILL * (1 / n + 1 / count) if n else 0.0  # one more where the sum ends
            cost = 10 * math.log10(total) + price
            if cost < best[1]:
                best = n, cost
        return best

    def layer(
        self, source: Node, form: Format, bias: np.ndarray, chain: int, rounded: np.ndarray | None = None
    ) -> Layer:
        """The contraction on integers, each the nearest to its weight unless `rounded` has them."""
        w, short = self.node.inputs[1].value, form.dtype is DType.u8
        scales = self._scales_8(form, bias) if short else self._scales_16(form, bias, chain)
        layer = Layer(self.node, source, np.zeros_like(w, np.int32), scales, chain=chain)
        if rounded is not None:
            layer.weights = rounded.astype(np.int32)
        else:
            real = w.astype(np.float32 if short else np.float64)  # as `_scales_16` rounded them
            limit = 127 if short else 32767
            layer.weights = np.clip(np.rint(real / layer.shaped(scales)), -limit, limit).astype(np.int32)
        layer.weight_bits = int(np.abs(layer.weights).max(initial=0)).bit_length() + 1
        return layer

    def _alike(self, scales: np.ndarray) -> np.ndarray:
        """[OC] of the wanted scales as they may be: all alike unless each channel has its own."""
        return scales if self._per_channel else np.full_like(scales, scales.max(initial=-np.inf))

    def _scales_8(self, form: Format, bias: np.ndarray) -> np.ndarray:
        """[OC] scales with which the weights fit -127..127, and bias and sums 32 bits."""
        w = np.abs(self._rows.astype(np.float64))
        reach = 255.0 * w.sum(1) + np.abs(bias) / form.scale  # of a sum, in units of w
        rounding = 128 * w.shape[1] + 1  # what rounding the weights and the bias may add to a sum
        scale = np.maximum(w.max(1, initial=0) / 127, reach / (INT32 - rounding))
        scale = self._alike(np.where(scale > 1e-30, scale, 1.0))
        return scale.astype(np.float32)

    def _scales_16(self, form: Format, bias: np.ndarray, chain: int) -> np.ndarray:
        """[OC] scales with which weights fit 16 bits and no input makes a sum, or a part of it, leave 32 bits.

        The bound holds for any activations in `form`: the largest times the positive weights, the
        smallest times the negative ones, plus the bias (an L1 bound of the channel's rounded weights).
        """
        w = self._rows.astype(np.float64)
        offset = np.abs(bias) / form.scale
        step = self._steps(form, bias, chain)
        while True:
            step = step.astype(np.float32).astype(np.float64)  # as it is stored
            integers = np.rint(w / step[:, None]).astype(np.int64)
            total = reach(form, integers) + np.rint(offset / step)
            over = total > INT32
            if chain:
                over = (total >= WIDEST) | (window_reach(integers, form.low, form.high, chain) > INT32 - 65535)
            if not over.any():
                return step.astype(np.float32)
            step = step * np.where(over, 1.002, 1.0) if self._per_channel else step * 1.002

    def _steps(self, form: Format, bias: np.ndarray, chain: int) -> np.ndarray:
        """[OC] scales of 16-bit weights before the weights are rounded."""
        # What a sum reaches is proportional to the range, but for its rounding to integers.
        if chain not in self._reach:
            unit, size = 1 / max(1, form.high - form.low), chain or self._rows.shape[1]
            self._reach[chain] = window_reach(self._rows, form.low * unit, form.high * unit, size)
        whole = self._reach[chain] * max(1, form.high - form.low)
        if not chain:
            whole = whole + np.abs(bias) / form.scale
        need = np.maximum(self._largest / 32767, whole / (INT32 - (65535 if chain else 0)))
        if chain:
            total = 2.0**15 * self._total + np.abs(bias) / form.scale
            need = np.maximum(need, total / (WIDEST - 2**36))
        return self._alike(np.where(need > 1e-30, need, 2.0**-31))
