"""Speed of the dense convolution kernel on layers of real networks, one thread.

    python benchmarks/kernels/bench_conv.py --isa avx512 [--only resnet50] [--block 32] [--json]

Each layer is timed in C++ with everything as warm as its size allows; the minimum and the median
over the repetitions are reported, and the share of the multiply-add peak that the same run measures
on registers alone.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from skive import pack

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "kernels"))
from driver import ISA_FLAGS, aligned, compile_library, cpu_isas, pointer  # noqa: E402


@dataclass(frozen=True)
class Layer:
    """One convolution of a network; `pad` is (top, left, bottom, right)."""

    network: str
    image: tuple[int, int, int, int]
    kernel: tuple[int, int, int]
    stride: tuple[int, int] = (1, 1)
    pad: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: int = 1

    @property
    def output(self) -> tuple[int, int, int, int]:
        n, h, w, _ = self.image
        t, left, b, r = self.pad
        oc, kh, kw = self.kernel
        (sh, sw), d = self.stride, self.dilation
        return n, (h + t + b - d * (kh - 1) - 1) // sh + 1, (w + left + r - d * (kw - 1) - 1) // sw + 1, oc

    @property
    def macs(self) -> int:
        return int(np.prod(self.output)) * self.image[3] * self.kernel[1] * self.kernel[2]

    @property
    def name(self) -> str:
        n, h, w, c = self.image
        oc, kh, kw = self.kernel
        return f"{n}x{h}x{w}x{c} {kh}x{kw}s{self.stride[0]}{f'd{self.dilation}' * (self.dilation > 1)} -> {oc}"


def square(network: str, size: int, c: int, k: int, s: int, oc: int, batch: int = 1, dilation: int = 1) -> Layer:
    """A k x k convolution with "same" padding (k // 2 taps on every side)."""
    p = k // 2 * dilation
    return Layer(network, (batch, size, size, c), (oc, k, k), (s, s), (p, p, p, p), dilation)


def matmul(network: str, m: int, k: int, n: int) -> Layer:
    return Layer(network, (1, 1, m, k), (n, 1, 1))


LAYERS = [
    square("resnet50", 224, 3, 7, 2, 64),
    square("resnet50", 56, 64, 1, 1, 64),
    square("resnet50", 56, 64, 3, 1, 64),
    square("resnet50", 56, 64, 1, 1, 256),
    square("resnet50", 56, 256, 1, 1, 64),
    square("resnet50", 56, 256, 1, 1, 128),
    square("resnet50", 56, 128, 3, 2, 128),
    square("resnet50", 28, 128, 1, 1, 512),
    square("resnet50", 56, 256, 1, 2, 512),
    square("resnet50", 28, 512, 1, 1, 128),
    square("resnet50", 28, 128, 3, 1, 128),
    square("resnet50", 28, 512, 1, 1, 256),
    square("resnet50", 28, 256, 3, 2, 256),
    square("resnet50", 14, 256, 1, 1, 1024),
    square("resnet50", 28, 512, 1, 2, 1024),
    square("resnet50", 14, 1024, 1, 1, 256),
    square("resnet50", 14, 256, 3, 1, 256),
    square("resnet50", 14, 1024, 1, 1, 512),
    square("resnet50", 14, 512, 3, 2, 512),
    square("resnet50", 7, 512, 1, 1, 2048),
    square("resnet50", 14, 1024, 1, 2, 2048),
    square("resnet50", 7, 2048, 1, 1, 512),
    square("resnet50", 7, 512, 3, 1, 512),
    matmul("resnet50", 1, 2048, 1000),
    square("resnet50b8", 7, 512, 3, 1, 512, batch=8),
    square("resnet50b8", 7, 2048, 1, 1, 512, batch=8),
    square("resnet18", 56, 64, 3, 2, 128),
    square("resnet18", 28, 128, 3, 2, 256),
    square("resnet18", 14, 256, 3, 2, 512),
    square("mobilenetv2", 224, 3, 3, 2, 32),
    square("mobilenetv2", 112, 32, 1, 1, 16),
    square("mobilenetv2", 112, 16, 1, 1, 96),
    square("mobilenetv2", 56, 96, 1, 1, 24),
    square("mobilenetv2", 56, 24, 1, 1, 144),
    square("mobilenetv2", 28, 144, 1, 1, 32),
    square("mobilenetv2", 28, 32, 1, 1, 192),
    square("mobilenetv2", 14, 192, 1, 1, 64),
    square("mobilenetv2", 14, 64, 1, 1, 384),
    square("mobilenetv2", 14, 384, 1, 1, 96),
    square("mobilenetv2", 14, 96, 1, 1, 576),
    square("mobilenetv2", 7, 576, 1, 1, 160),
    square("mobilenetv2", 7, 160, 1, 1, 960),
    square("mobilenetv2", 7, 960, 1, 1, 320),
    square("mobilenetv2", 7, 320, 1, 1, 1280),
    matmul("mobilenetv2", 1, 1280, 1000),
    square("efficientnet", 28, 144, 1, 1, 40),
    square("efficientnet", 28, 40, 1, 1, 240),
    square("efficientnet", 14, 480, 1, 1, 112),
    square("efficientnet", 7, 1152, 1, 1, 192),
    matmul("efficientnet", 1, 1152, 48),
    matmul("efficientnet", 1, 48, 1152),
    Layer("ds-cnn", (1, 49, 10, 1), (64, 10, 4), (2, 2), (4, 1, 5, 1)),
    square("ds-cnn", 25, 64, 1, 1, 64),
    Layer("ds-cnn", (1, 25, 5, 64), (64, 1, 1)),
    square("resnet8", 32, 3, 3, 1, 16),
    square("resnet8", 32, 16, 3, 1, 16),
    square("resnet8", 16, 32, 3, 1, 32),
    square("resnet8", 8, 64, 3, 1, 64),
    square("espcn", 128, 1, 5, 1, 64),
    square("espcn", 128, 64, 3, 1, 32),
    square("espcn", 128, 32, 3, 1, 9),
    square("vgg16", 224, 64, 3, 1, 64),
    square("vgg16", 28, 512, 3, 1, 512),
    matmul("vgg16", 1, 25088, 4096),
    square("unet", 128, 16, 3, 1, 16),
    square("unet", 128, 16, 1, 1, 2),
    Layer("vit", (1, 224, 224, 3), (192, 16, 16), (16, 16)),
    matmul("vit", 197, 192, 576),
    matmul("vit", 197, 192, 768),
    matmul("vit", 197, 768, 192),
    matmul("bert", 128, 768, 768),
    matmul("bert", 128, 768, 3072),
    matmul("bert", 128, 3072, 768),
    Layer("conv1d", (1, 1, 1024, 32), (64, 1, 9), (1, 1), (0, 4, 0, 4)),
    # Rates of the pyramids of Chen et al., Rethinking Atrous Convolution, 2017; taps in the border count, too.
    *(square("deeplab", 33, 256, 3, 1, 256, dilation=d) for d in (2, 6, 12, 18, 24, 36)),
    square("drn", 28, 128, 3, 1, 128, dilation=2),
    Layer("wavenet", (1, 1, 512, 64), (64, 1, 3), (1, 1), (0, 128, 0, 0), 64),
]

_PRELUDE = """
#include <time.h>

#include "skive/conv.h"
namespace skive { inline namespace SKIVE_ISA {
// Time of this thread alone: other work on the machine costs caches, not seconds.
static double now() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}
template <class F> static void repeat(F f, int samples, double least, double* seconds) {
  int turns = 1;
  for (;; turns *= 2) {
    const double t = now();
    for (int i = 0; i < turns; ++i) f();
    if (now() - t > least) break;
  }
  for (int s = 0; s < samples; ++s) {
    const double t = now();
    for (int i = 0; i < turns; ++i) f();
    seconds[s] = (now() - t) / turns;
  }
}
"""

# Twelve independent chains, each with an unknown start, hide the latency of a multiply-add.
_PEAK = """
template <int... I> static void peak_loop(const float* x, Index<I...>) {
  struct Chains : Slot<I, F32Tile::Lanes<kLanes>>... {} a;
  const auto b = F32Tile::broadcast<kLanes>(x);
  ((slot<I>(a) = F32Tile::load_lanes<kLanes>(x + I)), ...);
  for (int i = 0; i < 10000; ++i) {
    ((slot<I>(a) = F32Tile::multiply_add(slot<I>(a), slot<I>(a), b)), ...);
  }
  static float sink[kLanes];
  (store(sink, load(sink) + F32Tile::finish<kLanes>(slot<I>(a))), ...);
}
extern "C" void peak(const float* x, int samples, double* seconds) {
  repeat([=] { peak_loop(x, Indices<12>{}); }, samples, 2e-4, seconds);
}
"""

_LAYER = """
using Layer%(i)d = conv2d<%(type)s>;
extern "C" long scratch_%(i)d() { return static_cast<long>(Layer%(i)d::scratch_bytes(1)); }
extern "C" void bench_%(i)d(const float* x, const float* w, const float* bias, float* y,
                            void* scratch, int samples, double* seconds) {
  repeat([=] {
    Layer%(i)d::run(x, w, bias, y, scratch, Part{}, [](auto acc, ptrdiff_t, int) {
      return vmax(acc, zero<decltype(acc)::lanes>());
    });
  }, samples, 2e-4, seconds);
}
"""


def block_of(layer: Layer, isa: str, block: int | None) -> int:
    return block or pack.conv2d_block(layer.kernel[0], isa, int(np.prod(layer.output[:3])))


def cpp(layer: Layer, block: int) -> str:
    tags = [("Image", layer.image), ("Kernel", layer.kernel), ("Stride", layer.stride),
            ("Pad", layer.pad), ("Dilation", (layer.dilation, layer.dilation))]  # fmt: skip
    shapes = [f"{name}<{', '.join(map(str, values))}>" for name, values in tags]
    return f"{', '.join(shapes)}, {block}"


def time_layer(lib: ctypes.CDLL, index: int, layer: Layer, block: int, samples: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    oc, kh, kw = layer.kernel
    x = aligned(rng.standard_normal(layer.image, np.float32))
    w = aligned(pack.pack_conv2d(rng.standard_normal((oc, kh, kw, layer.image[3]), np.float32), block))
    bias = aligned(pack.pack_bias(np.zeros(oc, np.float32), block))
    y = aligned(np.zeros(layer.output, np.float32))
    scratch = aligned(np.zeros(getattr(lib, f"scratch_{index}")() // 4, np.float32))
    seconds = np.zeros(samples)
    getattr(lib, f"bench_{index}")(pointer(x), pointer(w), pointer(bias), pointer(y),
                                   pointer(scratch), samples, pointer(seconds))  # fmt: skip
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--isa", choices=list(ISA_FLAGS), default=cpu_isas()[0])
    parser.add_argument("--only", help="networks whose name contains this")
    parser.add_argument("--block", type=int, help="output channels per packed block")
    parser.add_argument("--samples", type=int, default=30)
    parser.add_argument("--optimize", default="-O2")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    layers = [layer for layer in LAYERS if not options.only or options.only in layer.network]
    blocks = [block_of(layer, options.isa, options.block) for layer in layers]
    body = "".join(
        _LAYER % {"i": i, "type": cpp(layer, block)}
        for i, (layer, block) in enumerate(zip(layers, blocks, strict=True))
    )
    with tempfile.TemporaryDirectory() as folder:
        lib = compile_library(_PRELUDE + _PEAK + body + "} }", options.isa, Path(folder),
                              flags=(options.optimize,))  # fmt: skip
        peaks = np.zeros(options.samples)
        lib.peak(pointer(aligned(np.full(64, 0.5, np.float32))), options.samples, pointer(peaks))
        lanes = {"avx512": 16, "avx2": 8, "generic": 4}[options.isa]
        peak = 12 * 10000 * lanes / peaks.min() / 1e9
        rows = []
        for i, (layer, block) in enumerate(zip(layers, blocks, strict=True)):
            seconds = time_layer(lib, i, layer, block, options.samples)
            rate = layer.macs / seconds.min() / 1e9
            rows.append({"network": layer.network, "layer": layer.name, "block": block,
                         "min_us": seconds.min() * 1e6, "median_us": float(np.median(seconds)) * 1e6,
                         "gmacs": rate, "share": rate / peak})  # fmt: skip
            if not options.json:
                print(f"{layer.network:12} {layer.name:28} NB {block:3} {rows[-1]['min_us']:9.1f} us "
                      f"(median {rows[-1]['median_us']:9.1f}) {rate:6.1f} GMAC/s {rate / peak:6.1%}",
                      flush=True)  # fmt: skip
    if options.json:
        print(json.dumps({"isa": options.isa, "peak_gmacs": peak, "layers": rows}, indent=1))
    else:
        total = sum(layer.macs for layer in layers) / sum(r["min_us"] for r in rows) / 1e3
        print(f"peak {peak:.1f} GMAC/s; all layers together {total:.1f} GMAC/s, {total / peak:.1%}")


if __name__ == "__main__":
    main()
