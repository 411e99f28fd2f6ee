"""What stored integers stand for: real = scale * (integer - zero).

8 bit: u8 with a zero point. 16 bit: i16 with one exponent per tensor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from skive.types import DType

# 16-bit ranges keep at least this much room above the largest value seen, and whatever their power of two
# leaves: saturation costs more than half a bit where rounding noise lies 70 dB below the signal.
HEADROOM = 1.6

Range = tuple[float, float]


@dataclass(frozen=True)
class Format:
    """real = scale * (integer - zero), integers of `dtype` within low..high."""

    dtype: DType
    scale: float
    zero: int
    low: int
    high: int

    @property
    def bits(self) -> int:
        """Bits that a value takes, sign included."""
        if self.dtype is DType.u8:
            return 8
        return max(~self.low, self.high).bit_length() + 1

    @property
    def range(self) -> Range:
        return (self.low - self.zero) * self.scale, (self.high - self.zero) * self.scale

    def integers(self, x: np.ndarray) -> np.ndarray:
        """`x` quantized, as int32."""
        q = np.rint(x / np.float32(self.scale)) + self.zero
        return np.clip(q, self.low, self.high).astype(np.int32)

    def real(self, x: np.ndarray) -> np.ndarray:
        """`x` as it is read back."""
        return (self.integers(x) - self.zero).astype(np.float32) * np.float32(self.scale)


def affine(low: float, high: float) -> Format:
    """The u8 format whose range covers low..high and holds 0 exactly."""
    low, high = min(0.0, low), max(0.0, high)
    scale = float(np.float32((high - low) / 255))
    if not scale > 1e-30:
        return Format(DType.u8, 1.0, 0, 0, 255)
    return Format(DType.u8, scale, int(np.clip(round(-low / scale), 0, 255)), 0, 255)


def fixed(low: float, high: float, bits: int) -> Format:
    """The i16 format with the smallest power-of-two scale for which `bits` bits cover low..high.

    Integers are held to `bits` bits, and to one sign if the interval has one: how far a sum can go depends on it.
    """
    limit = 2 ** (bits - 1) - 1
    magnitude = max(abs(low), abs(high))
    exponent = max(-100, math.ceil(math.log2(magnitude / limit))) if magnitude > 1e-30 else 0
    bottom, top = limit + 1 if low < -1e-30 else 0, limit if high > 1e-30 else 0
    return Format(DType.i16, 2.0**exponent, 0, -bottom, top)
