"""Networks with real weights on real data: the same values and the same accuracy as onnxruntime.

The keyword model ships with the repository; the others lie beside it in ../shared/data where present.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

import skive

ort = pytest.importorskip("onnxruntime")

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "keyword_spotting"
DATA = ROOT.parent / "shared" / "data"
MODELS = sorted((DATA / "models").glob("*.onnx"))
TOLERANCE = 1e-4  # of the range of an output
SUBSET = 1000

needs_data = pytest.mark.skipif(not MODELS, reason=f"no models in {DATA / 'models'}")


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Batch 1, and images of 96 x 128 for the super-resolution networks."""
    session = reference(path)
    result = {}
    for port in session.get_inputs():
        free = iter((96, 128))
        dims = [1, *port.shape[1:]]
        result[port.name] = tuple(d if isinstance(d, int) else next(free) for d in dims)
    return result


def reference(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def check_agreement(path: Path, folder: Path) -> None:
    sizes = shapes(path)
    module = skive.compile(path, input_shapes=sizes, output=folder, verify=False)
    session = reference(path)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        inputs = {name: rng.random(shape, np.float32) for name, shape in sizes.items()}
        got = module(*inputs.values())
        got = got if isinstance(got, tuple) else (got,)
        for g, w, port in zip(got, session.run(None, inputs), session.get_outputs(), strict=True):
            assert g.shape == w.shape and g.dtype == w.dtype
            assert np.abs(g - w).max() <= TOLERANCE * max(np.ptp(w), 1e-30), port.name


QUICK = ("mnist_cnn", "ad_autoencoder", "sr_espcn_x2", "ic_resnet8")


@needs_data
@pytest.mark.parametrize("path", [
    pytest.param(p, id=p.stem, marks=() if p.stem in QUICK else pytest.mark.slow) for p in MODELS])
def test_every_model_agrees_with_onnxruntime(path: Path, tmp_path: Path) -> None:
    check_agreement(path, tmp_path / "artefact")


# ---------------------------------------------------------------------------------------- accuracy


def cifar(normalised: bool) -> tuple[np.ndarray, np.ndarray]:
    with np.load(DATA / "cifar10_test_a.npz") as f:
        x, y = f["x"].astype(np.float32), f["y"]
    if normalised:
        mean, std = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
        x = (x / np.float32(255) - mean) / std
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2)), y


def mnist() -> tuple[np.ndarray, np.ndarray]:
    with np.load(DATA / "mnist_test_a.npz") as f:
        return f["x"].astype(np.float32)[:, None], f["y"]


def keywords() -> tuple[np.ndarray, np.ndarray]:
    with np.load(EXAMPLE / "kws_mfcc_a.npz") as f:
        return ((f["x"].astype(np.float32) - 83) * np.float32(0.5847029089927673))[:, None], f["y"]


# model -> (images and labels, accuracy in per cent on all of them: ../shared/data/README.md)
CASES: Mapping[str, tuple[Callable[[], tuple[np.ndarray, np.ndarray]], float]] = {
    "mnist_cnn": (mnist, 98.30),
    "ic_resnet8": (lambda: cifar(False), 76.44),
    "resnet20_cifar10": (lambda: cifar(True), 85.84),
    "resnet56_cifar10": (lambda: cifar(True), 87.80),
}


def classes(path: Path, images: np.ndarray, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """The classes that skive and onnxruntime find in each of the images."""
    session = reference(path)
    (port,) = session.get_inputs()
    shape = (1, *images.shape[1:])
    module = skive.compile(path, input_shapes={port.name: shape}, output=folder, verify=False)
    found: Sequence[list[int]] = [], []
    for image in images:
        x = image.reshape(shape)
        found[0].append(int(np.argmax(module(x))))
        found[1].append(int(np.argmax(session.run(None, {port.name: x})[0])))
    return np.array(found[0]), np.array(found[1])


def per_cent(classes_: np.ndarray, labels: np.ndarray) -> float:
    return round(100 * float(np.mean(classes_ == labels)), 2)


def test_keywords_are_spotted_as_well(tmp_path: Path) -> None:
    x, y = keywords()
    ours, theirs = classes(EXAMPLE / "kws_dscnn.onnx", x, tmp_path / "artefact")
    assert per_cent(ours, y) == per_cent(theirs, y) == 90.50
    np.testing.assert_array_equal(ours, theirs)


@needs_data
@pytest.mark.parametrize("name", [
    n if n in ("mnist_cnn", "ic_resnet8") else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_images_are_classified_as_well(name: str, tmp_path: Path) -> None:
    x, y = CASES[name][0]()
    x, y = x[:SUBSET], y[:SUBSET]
    ours, theirs = classes(DATA / "models" / f"{name}.onnx", x, tmp_path / "artefact")
    assert per_cent(ours, y) == per_cent(theirs, y)


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_whole_test_set(name: str, tmp_path: Path) -> None:
    load, accuracy = CASES[name]
    x, y = load()
    ours, theirs = classes(DATA / "models" / f"{name}.onnx", x, tmp_path / "artefact")
    assert per_cent(ours, y) == per_cent(theirs, y) == accuracy
