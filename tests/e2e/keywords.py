"""The shipped keyword-spotting network and its recordings."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import skive

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "keyword_spotting"
MODEL = EXAMPLE / "kws_dscnn.onnx"


def features() -> tuple[np.ndarray, np.ndarray]:
    """(features, float32 [600, 1, 49, 10], the class of each)."""
    with np.load(EXAMPLE / "kws_mfcc_a.npz") as a:
        return ((a["x"].astype(np.float32) - 83) * np.float32(0.5847029089927673))[:, np.newaxis], a["y"]


def compiled(**options: object) -> skive.Module:
    return skive.compile(MODEL, example_inputs=(features()[0][:1],), name="kws", **options)


def accuracy(module: skive.Module) -> float:
    x, y = features()
    return float(np.mean([np.argmax(module(v[None])) == c for v, c in zip(x[100:], y[100:], strict=True)]))
