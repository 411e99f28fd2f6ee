"""The real models and their data, as the accuracy of quantized networks is measured with them.

A folder DATA holds what its README describes: CIFAR-10, MNIST, keywords and three photos as `.npz`,
and the networks in `models/`. No sample is used both to calibrate and to evaluate: images are
calibrated on training images, keywords on the first hundred, and what is evaluated on a photo is
calibrated on crops of the other two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

CALIBRATION = 200  # samples at most
CROPS = 7  # of a photo, beside the whole

Decision = Callable[[np.ndarray, np.ndarray], bool]


@dataclass(frozen=True)
class Fold:
    """Inputs to evaluate, and others to calibrate with: arrays of samples along dimension 0.

    `expected`: the class of each input, or the brightness that a super-resolution network should give.
    `decisions`: how many of the first inputs are whole photos, on which the decision counts.
    """

    name: str
    calibration: np.ndarray
    inputs: np.ndarray
    expected: np.ndarray | None = None
    decisions: int = 0


@dataclass(frozen=True)
class RealModel:
    """A network, `kind` of what counts for it, and its data. kind: "top1" against labels, "psnr" against
    photos, "sqnr" against the float32 network. `same`: True if two outputs decide alike."""

    name: str
    kind: str
    folds: Callable[[Path], Iterator[Fold]]
    same: Decision

    def path(self, data: Path) -> Path:
        return data / "models" / f"{self.name}.onnx"


def _archive(path: Path, *names: str) -> list[np.ndarray]:
    with np.load(path) as f:
        return [f[n] for n in names]


def _nchw(images: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2), np.float32)


# ------------------------------------------------------------------------------- labelled test sets


def _keywords(data: Path) -> Iterator[Fold]:
    x, y = _archive(data / "kws_mfcc_a.npz", "x", "y")
    features = ((x.astype(np.float32) - 83) * np.float32(0.5847029089927673))[:, None]
    yield Fold("keywords", features[:100], features[100:], y[100:])


def _cifar(prepare: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], Iterator[Fold]]:
    def folds(data: Path) -> Iterator[Fold]:
        (train,) = _archive(data / "cifar10_train_0.npz", "x")
        x, y = _archive(data / "cifar10_test_a.npz", "x", "y")
        yield Fold("CIFAR-10", _nchw(prepare(train[:CALIBRATION])), _nchw(prepare(x)), y)

    return folds


def _mnist(data: Path) -> Iterator[Fold]:
    (train,) = _archive(data / "mnist_train.npz", "x")
    x, y = _archive(data / "mnist_test_a.npz", "x", "y")
    yield Fold("MNIST", train[:CALIBRATION, None].astype(np.float32), x[:, None].astype(np.float32), y)


def _imagenet(images: np.ndarray) -> np.ndarray:
    mean, deviation = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
    return (images.astype(np.float32) / np.float32(255) - mean) / deviation


# ----------------------------------------------------------------------------------------- photos


def _photos(data: Path) -> dict[str, np.ndarray]:
    with np.load(data / "photos.npz") as f:
        return {n: f[n] for n in f.files}


def _resized(image: np.ndarray, height: int, width: int, *, bicubic: bool = False) -> np.ndarray:
    from PIL import Image

    how = Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR
    return np.asarray(Image.fromarray(image).resize((width, height), how))


def _square(photo: np.ndarray) -> np.ndarray:
    """The largest square in the middle of `photo`."""
    edge = min(photo.shape[:2])
    top, left = (photo.shape[0] - edge) // 2, (photo.shape[1] - edge) // 2
    return photo[top:top + edge, left:left + edge]


def _crop(photo: np.ndarray, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """A random part of `photo` of that shape, of any size that fits, resized; mirrored half of the time."""
    most = min(photo.shape[0] / height, photo.shape[1] / width)
    scale = rng.uniform(min(0.6, most), most)
    h, w = int(height * scale), int(width * scale)
    top, left = int(rng.integers(0, photo.shape[0] - h + 1)), int(rng.integers(0, photo.shape[1] - w + 1))
    part = _resized(np.ascontiguousarray(photo[top:top + h, left:left + w]), height, width)
    return part[:, ::-1] if rng.random() < 0.5 else part


def _region(photo: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random part of `photo`, between half and all of its height and width; mirrored half of the time."""
    h, w = (int(d * rng.uniform(0.5, 1)) for d in photo.shape[:2])
    top, left = int(rng.integers(0, photo.shape[0] - h + 1)), int(rng.integers(0, photo.shape[1] - w + 1))
    part = photo[top:top + h, left:left + w]
    return np.ascontiguousarray(part[:, ::-1] if rng.random() < 0.5 else part)


def _classified(size: int, prepare: Callable[[np.ndarray], np.ndarray],
                fit: Callable[[np.ndarray, int], np.ndarray]) -> Callable[[Path], Iterator[Fold]]:
    """Each photo as `fit` brings it to size x size, and parts of it; calibrated on parts of the other photos and
    on training images of CIFAR-10, brought to size alike."""

    def folds(data: Path) -> Iterator[Fold]:
        photos = _photos(data)
        (train,) = _archive(data / "cifar10_train_0.npz", "x")
        for k, (name, photo) in enumerate(photos.items()):
            rng = np.random.default_rng(k)
            others = [p for n, p in photos.items() if n != name]
            seen = [fit(_region(others[i % len(others)], rng), size) for i in range(45)]
            seen += [fit(image, size) for image in train[:15]]
            inputs = [fit(photo, size)] + [fit(_region(photo, rng), size) for _ in range(CROPS)]
            yield Fold(name, _nchw(prepare(np.stack(seen))), _nchw(prepare(np.stack(inputs))), decisions=1)

    return folds


def _letterbox(photo: np.ndarray, size: int) -> np.ndarray:
    """The whole photo at the top left of a grey square."""
    scale = size / max(photo.shape[:2])
    h, w = int(photo.shape[0] * scale), int(photo.shape[1] * scale)
    square = np.full((size, size, 3), 114, np.uint8)
    square[:h, :w] = _resized(np.ascontiguousarray(photo), h, w)
    return square


def _middle(photo: np.ndarray, size: int) -> np.ndarray:
    return _resized(np.ascontiguousarray(_square(photo)), size, size)


def _brightness(image: np.ndarray) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.fromarray(image).convert("YCbCr"))[..., 0]


def _super_resolution(scale: int) -> Callable[[Path], Iterator[Fold]]:
    """Each photo reduced by `scale`; calibrated on crops of the other photos."""

    def folds(data: Path) -> Iterator[Fold]:
        photos = {n: _brightness(p) for n, p in _photos(data).items()}
        for k, (name, photo) in enumerate(photos.items()):
            rng = np.random.default_rng(k)
            h, w = photo.shape[0] // scale, photo.shape[1] // scale
            whole = np.ascontiguousarray(photo[:h * scale, :w * scale])
            others = [p for n, p in photos.items() if n != name]
            seen = np.stack([_crop(others[i % len(others)], h, w, rng) for i in range(40)])
            small = _resized(whole, h, w, bicubic=True)
            yield Fold(name, seen[:, None].astype(np.float32) / np.float32(255),
                       small[None, None].astype(np.float32) / np.float32(255), whole[None], decisions=1)

    return folds


# -------------------------------------------------------------------------------- anomaly detection


def _spectra(data: Path) -> Iterator[Fold]:
    """Windows of five 128-band log spectra. No recording comes with the network, so these are random and smooth,
    at the level, about -22 dB, at which the network reconstructs best: what it was trained on."""
    rng = np.random.default_rng(0)
    steps = rng.standard_normal((400, 5, 128)).astype(np.float32)
    tilt = np.linspace(-14, -30, 128, dtype=np.float32)
    smooth = np.apply_along_axis(lambda v: np.convolve(v, np.ones(8) / 8, "same"), 2, steps)
    level = rng.normal(0, 3, (400, 1, 1))
    x = (tilt + level + 6 * smooth + steps).astype(np.float32).reshape(400, 640)
    yield Fold("random spectra", x[:CALIBRATION], x[CALIBRATION:])


# -------------------------------------------------------------------------------------- decisions


def same_class(a: np.ndarray, b: np.ndarray) -> bool:
    """True if the largest score is the same."""
    return int(np.argmax(a)) == int(np.argmax(b))


def _nothing_to_decide(a: np.ndarray, b: np.ndarray) -> bool:
    return True


def detection(raw: np.ndarray) -> tuple[int, np.ndarray, float]:
    """(class, box [x0, y0, x1, y1] in pixels, score) of the surest object in the output of YOLOX, [1, N, 85]."""
    grids = [np.stack(np.meshgrid(np.arange(416 // s), np.arange(416 // s)), -1).reshape(-1, 2) for s in (8, 16, 32)]
    grid = np.concatenate(grids)
    stride = np.concatenate([np.full((len(g), 1), s) for g, s in zip(grids, (8, 16, 32), strict=True)])
    anchors = raw.reshape(-1, 85)
    scores = anchors[:, 4:5] * anchors[:, 5:]
    best, found = np.unravel_index(int(np.argmax(scores)), scores.shape)
    centre = (anchors[best, :2] + grid[best]) * stride[best]
    half = np.exp(anchors[best, 2:4]) * stride[best] / 2
    return int(found), np.concatenate([centre - half, centre + half]), float(scores[best, found])


def same_detection(a: np.ndarray, b: np.ndarray) -> bool:
    """True if the surest objects are of one class and their boxes overlap by at least 0.8 of their union."""
    (class_a, p, _), (class_b, q, _) = detection(a), detection(b)
    overlap = np.prod(np.maximum(0, np.minimum(p[2:], q[2:]) - np.maximum(p[:2], q[:2])))
    union = np.prod(p[2:] - p[:2]) + np.prod(q[2:] - q[:2]) - overlap
    return class_a == class_b and bool(overlap >= 0.8 * union)


REAL_MODELS: Sequence[RealModel] = (
    RealModel("kws_dscnn", "top1", _keywords, same_class),
    RealModel("ic_resnet8", "top1", _cifar(lambda x: x), same_class),
    RealModel("resnet20_cifar10", "top1", _cifar(_imagenet), same_class),
    RealModel("resnet56_cifar10", "top1", _cifar(_imagenet), same_class),
    RealModel("mnist_cnn", "top1", _mnist, same_class),
    RealModel("sr_espcn_x2", "psnr", _super_resolution(2), _nothing_to_decide),
    RealModel("sr_espcn_x3", "psnr", _super_resolution(3), _nothing_to_decide),
    RealModel("sr_fsrcnn_x2", "psnr", _super_resolution(2), _nothing_to_decide),
    RealModel("vww_mobilenetv1_025", "sqnr", _classified(96, lambda x: x / np.float32(255), _middle), same_class),
    RealModel("squeezenet1_1", "sqnr",
              _classified(227, lambda x: x[..., ::-1] - np.float32([104, 117, 123]), _middle), same_class),
    RealModel("yolox_nano", "sqnr", _classified(416, _imagenet, _letterbox), same_detection),
    RealModel("ad_autoencoder", "sqnr", _spectra, _nothing_to_decide),
)


def psnr(got: np.ndarray, want: np.ndarray, border: int = 8) -> float:
    """Peak signal-to-noise ratio in dB of a brightness in 0..1 against 8-bit pixels, without the border."""
    image = np.clip(np.round(got.reshape(want.shape).astype(np.float64) * 255), 0, 255)
    inner = (slice(border, -border), slice(border, -border))
    error = np.mean((image[inner] - want.astype(np.float64)[inner]) ** 2)
    return float(10 * np.log10(255**2 / error))
