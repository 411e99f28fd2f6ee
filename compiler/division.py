"""Division by a constant without a division, where it is shown to round to the same integers."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

NEIGHBOURS = 4  # float32 values on each side of a threshold; what `quotient` may be off moves it by one or two


@lru_cache(maxsize=1024)
def divides_exactly(divisor: float, lowest: int, highest: int) -> bool:
    """True if round_even(quotient(x, divisor)) of math.h, clipped to lowest..highest, is that of the float32 quotient
    x / divisor for every float32 x.

    The two are less than two units in the last place apart, so that only the arguments next to the thresholds
    (k + 1/2) divisor can differ: all of these are computed. (P. Markstein, Computation of elementary functions on the
    IBM RISC System/6000 processor, 1990, has the correction that makes them agree.)
    """
    d = np.float32(divisor)
    if not 2.0**-90 < float(d) < 2.0**90 or max(-lowest, highest) > 2**17:
        return False
    reciprocal = np.float32(1) / d
    around = ((np.arange(lowest - 2, highest + 2) + 0.5) * np.float64(d)).astype(np.float32)
    steps = np.arange(-NEIGHBOURS, NEIGHBOURS + 1, dtype=np.int32)
    x = (around.view(np.int32)[:, None] + steps).view(np.float32)  # no threshold is near 0: signs are kept
    want = np.rint(x / d)
    q = (x * reciprocal).astype(np.float64)
    rest = (x - q * np.float64(d)).astype(np.float32).astype(np.float64)  # exact before it is rounded: 48 bits
    exact = q + rest * np.float64(reciprocal)  # to 53 bits; the fused operation rounds it to 24 at once
    return all(bool((np.rint(e.astype(np.float32)) == want).all())
               for e in (exact, np.nextafter(exact, np.inf), np.nextafter(exact, -np.inf)))
