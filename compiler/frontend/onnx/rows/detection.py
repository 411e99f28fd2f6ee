"""Box suppression of detection heads."""

from __future__ import annotations

import numpy as np

from skive.errors import InvalidModelError
from skive.frontend.onnx.table import Call, onnx_op
from skive.ir import Node


@onnx_op("NonMaxSuppression", constant="boxes, scores")
def non_max_suppression(c: Call) -> Node:
    """The kept boxes [K, 3] as (batch, class, box). K depends on the values: boxes and scores must be constant."""
    boxes = c.const(0, "boxes, whose values decide the shape,", data=True)
    scores = c.const(1, "scores, whose values decide the shape,", data=True)
    most = int(c.const(2, "the number of boxes").reshape(-1)[0]) if c.has(2) else 0
    overlap = float(c.const(3, "the threshold").reshape(-1)[0]) if c.has(3) else 0.0
    lowest = float(c.const(4, "the threshold").reshape(-1)[0]) if c.has(4) else -np.inf
    if boxes.ndim != 3 or scores.ndim != 3 or boxes.shape != (scores.shape[0], scores.shape[2], 4):
        raise InvalidModelError(f"boxes {list(boxes.shape)} and scores {list(scores.shape)}")
    corners = boxes.astype(np.float64)
    if c.attr("center_point_box", 0):  # (x, y, width, height)
        corners = np.concatenate([corners[..., :2] - corners[..., 2:] / 2, corners[..., :2] + corners[..., 2:] / 2], -1)
    low, high = np.minimum(corners[..., :2], corners[..., 2:]), np.maximum(corners[..., :2], corners[..., 2:])
    kept = [(b, k, i) for b in range(scores.shape[0]) for k in range(scores.shape[1])
            for i in suppressed(low[b], high[b], scores[b, k], most, overlap, lowest)]
    return c.lit(np.array(kept, np.int64).reshape(-1, 3))


def suppressed(low: np.ndarray, high: np.ndarray, score: np.ndarray, most: int, overlap: float,
               lowest: float) -> list[int]:
    """Indices of the boxes kept, the best first: a box goes when it overlaps a kept one too much."""
    area = np.prod(high - low, -1)
    kept: list[int] = []
    for i in np.argsort(-score, kind="stable"):
        if len(kept) >= most or not score[i] > lowest:
            break
        common = np.prod(np.clip(np.minimum(high[i], high[kept]) - np.maximum(low[i], low[kept]), 0, None), -1)
        if not (common > overlap * (area[i] + area[kept] - common)).any():
            kept.append(int(i))
    return kept
