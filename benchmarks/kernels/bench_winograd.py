"""Speed and accuracy of the Winograd convolution beside the direct one, one thread.

    python benchmarks/kernels/bench_winograd.py [--isa avx512] [--only resnet18] [--json]

GMAC/s counts the multiply-adds of the direct method. Errors are the largest and the root mean square
difference to float64, over the range of the output, on rectified Gaussian activations and Gaussian
weights of variance 2 / (9 IC).
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
from timing import aligned, arguments, build, peak_gmacs, pointer, print_rows, seconds

from skive import pack


@dataclass(frozen=True)
class Layer:
    """A 3x3 convolution with padding 1."""

    network: str
    height: int
    width: int
    inputs: int
    outputs: int
    stride: int = 1

    @property
    def name(self) -> str:
        return (f"{self.network} {self.height}x{self.width}x{self.inputs} -> {self.outputs}"
                + f", stride {self.stride}" * (self.stride > 1))

    @property
    def macs(self) -> int:
        return -(-self.height // self.stride) * -(-self.width // self.stride) * self.inputs * self.outputs * 9

    def image(self) -> str:
        return f"Image<1, {self.height}, {self.width}, {self.inputs}>, Kernel<{self.outputs}, 3, 3>"


LAYERS = [
    Layer("resnet18", 56, 56, 64, 64),
    Layer("resnet18", 28, 28, 128, 128),
    Layer("resnet18", 14, 14, 256, 256),
    Layer("resnet18", 7, 7, 512, 512),
    Layer("resnet8", 32, 32, 16, 16),
    Layer("resnet8", 16, 16, 32, 32),
    Layer("resnet8", 8, 8, 64, 64),
    Layer("espcn", 180, 320, 64, 32),
    Layer("vgg16", 112, 112, 128, 128),
    Layer("vgg16", 14, 14, 512, 512),
    Layer("unet", 128, 128, 16, 16),
    Layer("unet", 16, 16, 256, 256),
    Layer("narrow", 56, 56, 8, 8),
    Layer("narrow", 56, 56, 16, 8),
    Layer("narrow", 56, 56, 8, 16),
    Layer("narrow", 56, 56, 3, 64),
    Layer("small", 4, 4, 128, 128),
    Layer("small", 5, 5, 128, 128),
    Layer("small", 6, 6, 128, 128),
    Layer("resnet18", 56, 56, 64, 128, 2),
    Layer("resnet18", 28, 28, 128, 256, 2),
    Layer("resnet18", 14, 14, 256, 512, 2),
    Layer("resnet20", 32, 32, 16, 32, 2),
    Layer("resnet20", 16, 16, 32, 64, 2),
    Layer("yolox", 104, 104, 32, 64, 2),
    Layer("narrow", 56, 56, 16, 16, 2),
    Layer("narrow", 56, 56, 8, 16, 2),
    Layer("small", 14, 14, 64, 64, 2),
]

_BODY = """
using Winograd%(i)d = winograd2d<%(image)s, %(stride)s, Pad<1, 1, 1, 1>, %(wide)d>;
using Direct%(i)d = conv2d<%(image)s, %(stride)s, Pad<1, 1, 1, 1>, Dilation<1, 1>, %(nb)d>;
extern "C" long winograd_scratch_%(i)d() { return static_cast<long>(Winograd%(i)d::scratch_bytes()); }
extern "C" long direct_scratch_%(i)d() { return static_cast<long>(Direct%(i)d::scratch_bytes()); }
extern "C" void winograd_%(i)d(const float* x, const float* w, const float* b, float* y, void* s,
                               int samples, double* times) {
  repeat([=] { Winograd%(i)d::run(x, w, b, y, s, Part{}, Relu{}); }, samples, times);
}
extern "C" void direct_%(i)d(const float* x, const float* w, const float* b, float* y, void* s,
                             int samples, double* times) {
  repeat([=] { Direct%(i)d::run(x, w, b, y, s, Part{}, Relu{}); }, samples, times);
}
"""


def exact(x: np.ndarray, w: np.ndarray, stride: int) -> np.ndarray:
    """Rectified convolution in float64, x [H, W, C], w [OC, 3, 3, C]."""
    padded = np.pad(x.astype(float), ((1, 1), (1, 1), (0, 0)))
    h, width, _ = x.shape
    y = sum(padded[i : i + h : stride, j : j + width : stride] @ w[:, i, j].T.astype(float)
            for i in range(3) for j in range(3))  # fmt: skip
    return np.maximum(np.asarray(y), 0)


def main() -> None:
    args = arguments(__doc__)
    layers = [layer for layer in LAYERS if args.only in layer.name]
    body = ""
    for i, layer in enumerate(layers):
        body += _BODY % {
            "i": i, "image": layer.image(), "stride": f"Stride<{layer.stride}, {layer.stride}>",
            "wide": pack.winograd_block(layer.outputs, args.isa),
            "nb": pack.conv2d_block(layer.outputs, args.isa),
        }  # fmt: skip
    library = build(["winograd", "conv"], body, args.isa, args.opt)
    peak = peak_gmacs(library)
    rng = np.random.default_rng(0)
    rows = []
    for i, layer in enumerate(layers):
        shape = (layer.height, layer.width, layer.inputs)
        x = aligned(np.maximum(rng.standard_normal(shape), 0).astype(np.float32))
        w = rng.standard_normal((layer.outputs, 3, 3, layer.inputs)).astype(np.float32)
        w *= np.float32(np.sqrt(2 / (9 * layer.inputs)))
        want = exact(x, w, layer.stride)
        row: dict[str, object] = {"layer": layer.name}
        for kind in ("winograd", "direct"):
            block = getattr(pack, "winograd_block" if kind == "winograd" else "conv2d_block")(
                layer.outputs, args.isa
            )
            weights = pack.pack_winograd(w, block, layer.stride) if kind == "winograd" else pack.pack_conv2d(w, block)
            packed = aligned(weights)
            bias = aligned(pack.pack_bias(np.zeros(layer.outputs, np.float32), block))
            size = getattr(library, f"{kind}_scratch_{i}")
            size.restype = ctypes.c_long
            scratch = aligned(np.zeros(size() // 4, np.float32))
            y = aligned(np.zeros(want.shape, np.float32))
            times = seconds(
                getattr(library, f"{kind}_{i}"), *map(pointer, (x, packed, bias, y, scratch))
            )
            gmacs = float(layer.macs / times.min() * 1e-9)
            error = np.abs(y - want) / want.max()
            row |= {f"{kind} us": float(times.min() * 1e6), f"{kind} GMAC/s": gmacs,
                    f"{kind} % peak": 100 * gmacs / peak, f"{kind} error": float(error.max()),
                    f"{kind} rms": float(np.sqrt((error**2).mean()))}  # fmt: skip
            if kind == "winograd":
                row["scratch KB"] = size() // 1024
        row["speed-up"] = float(row["direct us"]) / float(row["winograd us"])  # type: ignore[arg-type]
        rows.append(row)
    print_rows(rows, as_json=args.json, isa=args.isa, peak_gmacs=round(peak, 1))


if __name__ == "__main__":
    main()
