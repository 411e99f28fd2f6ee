"""Speed of the depthwise convolution on layers of real networks, one thread.

    python benchmarks/kernels/bench_depthwise.py [--isa avx512] [--only mobilenetv2] [--json]

GMAC/s counts all taps, also those in the padding, which cost nothing: small images may pass 100 %.
GB/s counts the input once and the output once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from timing import aligned, arguments, build, peak_gmacs, pointer, print_rows, seconds

from skive import pack


@dataclass(frozen=True)
class Layer:
    """One depthwise convolution; `pad` is (top, left, bottom, right)."""

    network: str
    image: tuple[int, int, int]
    kernel: tuple[int, int]
    stride: int = 1
    pad: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: int = 1

    @property
    def output(self) -> tuple[int, int, int]:
        h, w, c = self.image
        t, left, b, r = self.pad
        kh, kw = self.kernel
        return ((h + t + b - kh) // self.stride + 1,
                (w + left + r - self.dilation * (kw - 1) - 1) // self.stride + 1, c)  # fmt: skip

    @property
    def name(self) -> str:
        h, w, c = self.image
        dilation = f" d{self.dilation}" if self.dilation > 1 else ""
        return (f"{self.network} {h}x{w}x{c} {self.kernel[0]}x{self.kernel[1]} "
                f"s{self.stride}{dilation}")  # fmt: skip

    def cpp(self) -> str:
        h, w, c = self.image
        pad = ", ".join(map(str, self.pad))
        return (f"depthwise2d<Image<1, {h}, {w}, {c}>, Kernel<{c}, {self.kernel[0]}, "
                f"{self.kernel[1]}>, Stride<{self.stride}, {self.stride}>, Pad<{pad}>, "
                f"Dilation<1, {self.dilation}>>")  # fmt: skip


def square(network: str, size: int, channels: int, k: int, stride: int) -> Layer:
    p = k // 2
    return Layer(network, (size, size, channels), (k, k), stride, (p, p, p, p))


LAYERS = [
    square("mobilenetv2", 112, 32, 3, 1),
    square("mobilenetv2", 112, 96, 3, 2),
    square("mobilenetv2", 56, 144, 3, 1),
    square("mobilenetv2", 56, 144, 3, 2),
    square("mobilenetv2", 28, 192, 3, 1),
    square("mobilenetv2", 28, 192, 3, 2),
    square("mobilenetv2", 14, 384, 3, 1),
    square("mobilenetv2", 14, 576, 3, 2),
    square("mobilenetv2", 7, 960, 3, 1),
    square("mobilenetv1", 14, 512, 3, 1),
    square("mobilenetv1", 7, 1024, 3, 1),
    square("efficientnet-b0", 56, 144, 5, 2),
    square("efficientnet-b0", 28, 240, 5, 1),
    square("efficientnet-b0", 14, 480, 5, 1),
    square("efficientnet-b0", 14, 672, 5, 2),
    square("efficientnet-b0", 7, 1152, 5, 1),
    square("mobilenetv3", 56, 72, 3, 1),
    square("mobilenetv3", 28, 120, 5, 1),
    square("mobilenetv3", 56, 24, 3, 1),
    square("vww", 48, 8, 3, 1),
    Layer("ds-cnn", (25, 5, 64), (3, 3), 1, (1, 1, 1, 1)),
    Layer("tcn", (1, 400, 256), (1, 3), 1, (0, 2, 0, 0)),
    Layer("tcn", (1, 400, 256), (1, 3), 1, (0, 16, 0, 0), 8),
    Layer("conformer", (1, 400, 256), (1, 31), 1, (0, 15, 0, 15)),
]

_BODY = """
extern "C" void bench_%(i)d(const float* x, const float* w, const float* bias, float* y, int samples,
                            double* times) {
  repeat([=] { %(type)s::run(x, w, bias, y, nullptr, Part{}, Relu{}); }, samples, times);
}
"""


def main() -> None:
    args = arguments(__doc__)
    layers = [layer for layer in LAYERS if args.only in layer.name]
    body = "".join(_BODY % {"i": i, "type": layer.cpp()} for i, layer in enumerate(layers))
    library = build(["depthwise"], body, args.isa, args.opt)
    peak = peak_gmacs(library)
    rng = np.random.default_rng(0)
    rows = []
    for i, layer in enumerate(layers):
        x = aligned(rng.standard_normal(layer.image).astype(np.float32))
        y = aligned(np.zeros(layer.output, np.float32))
        taps = rng.standard_normal((layer.image[2], *layer.kernel)).astype(np.float32)
        w, bias = map(aligned, pack.pack_depthwise(taps, None))
        times = seconds(getattr(library, f"bench_{i}"), *map(pointer, (x, w, bias, y)))
        gmacs = float(np.prod(layer.output) * np.prod(layer.kernel) / times.min() * 1e-9)
        rows.append({
            "layer": layer.name, "us": float(times.min() * 1e6),
            "median us": float(np.median(times) * 1e6), "GMAC/s": gmacs, "% peak": 100 * gmacs / peak,
            "GB/s": float((x.nbytes + y.nbytes) / times.min() * 1e-9),
        })  # fmt: skip
    print_rows(rows, as_json=args.json, isa=args.isa, peak_gmacs=round(peak, 1))


if __name__ == "__main__":
    main()
