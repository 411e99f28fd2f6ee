"""Integer convolution layers of common networks: GMAC/s and share of the dot-product peak, one thread.

    python benchmarks/kernels/bench_conv_integer.py --only resnet50 --element int16

The epilogue requantizes to the input's type with a factor per channel, as a compiled network does.
The peak is that of a few accumulators with the target's own multiply-add: one instruction with VNNI.
Without VNNI it is several, and how well a loop spreads them over the processor's ports decides: there a
kernel may exceed the loop that is called the peak.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from bench_conv import _PRELUDE, LAYERS, Layer, cpp
from numpy.typing import NDArray

from skive import pack

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "kernels"))
from driver import INTEGER_ISA_FLAGS, compile_library, cpu_isas, pointer  # noqa: E402

# Input, weight and element size, and the tile policy whose peak is measured.
ELEMENTS = {
    "uint8": (np.uint8, np.int8, "U8Tile", pack.pack_conv2d_u8),
    "int16": (np.int16, np.int16, "I16Tile", pack.pack_conv2d_i16),
}

_PEAK = """
using Policy = %s;
template <int... I> static void peak_loop(const int32_t* x, Index<I...>) {
  struct Chains : Slot<I, Policy::Lanes<kLanes>>... {} a;
  struct Factors : Slot<I, Policy::Weights<kLanes>>... {} w;
  ((slot<I>(a) = Policy::load_lanes<kLanes>(x + I)), ...);
  ((slot<I>(w) = Policy::load_weights<kLanes>(reinterpret_cast<const Policy::Weight*>(x + I))), ...);
  for (int i = 0; i < 10000; ++i) {
    // A constant product would be taken out of the loop.
    __asm__ volatile("" : : "r"(x) : "memory");
    const auto b = Policy::broadcast<kLanes>(reinterpret_cast<const Policy::Element*>(x));
    ((slot<I>(a) = Policy::multiply_add(slot<I>(a), Policy::narrow<kLanes>(b), slot<I>(w))), ...);
  }
  static int32_t sink[kLanes];
  (store(sink, load<kLanes>(sink) + Policy::finish<kLanes>(slot<I>(a))), ...);
}
constexpr int kChains = (Policy::kWeightRegisters > 1 ? 4 : 6) * Policy::kRegisters / 16;
extern "C" double peak(const int32_t* x, int samples, double* seconds) {
  repeat([=] { peak_loop(x, Indices<kChains>{}); }, samples, 2e-4, seconds);
  return double(kChains) * 10000 * kLanes * Policy::kStep;
}
"""

_LAYER = """
using Layer%(i)d = conv2d<%(type)s>;
extern "C" long scratch_%(i)d() { return static_cast<long>(Layer%(i)d::scratch_bytes(1)); }
extern "C" void bench_%(i)d(const %(x)s* x, const %(w)s* w, const int32_t* bias, %(x)s* y,
                            void* scratch, const float* factor, int samples, double* seconds) {
  repeat([=] {
    Layer%(i)d::run(x, w, bias, y, scratch, Part{}, [=](auto acc, ptrdiff_t, int channel) {
      return rounded<%(x)s, true>(to_float(acc) * load<decltype(acc)::lanes>(factor + channel), %(zero)d);
    });
  }, samples, 2e-4, seconds);
}
"""


def aligned(values: NDArray[np.generic]) -> NDArray[np.generic]:
    """A copy of `values` that starts at a 64-byte boundary."""
    raw = np.empty(values.nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    view = raw[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
    view[...] = values
    return view


def time_layer(
    lib: ctypes.CDLL, index: int, layer: Layer, block: int, element: str, samples: int
) -> NDArray[np.float64]:
    """Seconds of each sample of one layer."""
    rng = np.random.default_rng(0)
    oc, kh, kw = layer.kernel
    x_type, w_type, _, packing = ELEMENTS[element]
    x = aligned(rng.integers(0, 100, layer.image).astype(x_type))
    weights = rng.integers(-100, 100, (oc, kh, kw, layer.image[3])).astype(w_type)
    w = aligned(packing(weights, block, (layer.dilation, layer.dilation)))
    bias = aligned(pack.pack_bias_i32(None, weights, 3, block))
    factor = aligned(np.full(oc, 1e-3, np.float32))
    y = aligned(np.zeros(layer.output, x_type))
    scratch = aligned(np.zeros(getattr(lib, f"scratch_{index}")(), np.uint8))
    seconds = np.zeros(samples)
    getattr(lib, f"bench_{index}")(pointer(x), pointer(w), pointer(bias), pointer(y), pointer(scratch),
                                   pointer(factor), samples, pointer(seconds))  # fmt: skip
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--isa", choices=list(INTEGER_ISA_FLAGS), default=cpu_isas(INTEGER_ISA_FLAGS)[0])
    parser.add_argument("--element", choices=list(ELEMENTS), default="uint8")
    parser.add_argument("--only", help="networks whose name contains this")
    parser.add_argument("--block", type=int, help="output channels per packed block")
    parser.add_argument("--samples", type=int, default=30)
    parser.add_argument("--optimize", default="-O2")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    layers = [layer for layer in LAYERS if not options.only or options.only in layer.network]
    x_type, w_type, policy, _ = ELEMENTS[options.element]
    blocks = [
        options.block
        or pack.conv2d_block(
            layer.kernel[0], options.isa, int(np.prod(layer.output[:3])),
            element_size=np.dtype(x_type).itemsize, depth=layer.image[3] * layer.kernel[1] * layer.kernel[2],
        )
        for layer in layers
    ]  # fmt: skip
    names = {"x": f"{np.dtype(x_type).name}_t", "w": f"{np.dtype(w_type).name}_t", "zero": 3}
    body = "".join(
        _LAYER
        % {"i": i, **names,
           "type": f"{cpp(layer, block)}, {layer.image[3]}, {layer.kernel[0]}, {names['x']}, 3"}  # fmt: skip
        for i, (layer, block) in enumerate(zip(layers, blocks, strict=True))
    )
    with tempfile.TemporaryDirectory() as folder:
        source = '#include "skive/math.h"\n' + _PRELUDE + _PEAK % policy + body + "} }"
        lib = compile_library(source, options.isa, Path(folder), flags=(options.optimize, "-ffp-contract=off"))
        lib.peak.restype = ctypes.c_double
        peaks = np.zeros(options.samples)
        peak_macs = lib.peak(pointer(aligned(np.ones(64, np.int32))), options.samples, pointer(peaks))
        peak = peak_macs / peaks.min() / 1e9
        rows = []
        for i, (layer, block) in enumerate(zip(layers, blocks, strict=True)):
            seconds = time_layer(lib, i, layer, block, options.element, options.samples)
            rate = layer.macs / seconds.min() / 1e9
            rows.append({"network": layer.network, "layer": layer.name, "block": block,
                         "min_us": seconds.min() * 1e6, "median_us": float(np.median(seconds)) * 1e6,
                         "gmacs": rate, "share": rate / peak})  # fmt: skip
            if not options.json:
                print(f"{layer.network:12} {layer.name:28} NB {block:3} {rows[-1]['min_us']:9.1f} us "
                      f"(median {rows[-1]['median_us']:9.1f}) {rate:6.1f} GMAC/s {rate / peak:6.1%}",
                      flush=True)  # fmt: skip
    if options.json:
        print(json.dumps({"isa": options.isa, "element": options.element, "peak_gmacs": peak,
                          "layers": rows}, indent=1))  # fmt: skip
    else:
        total = sum(layer.macs for layer in layers) / sum(r["min_us"] for r in rows) / 1e3
        print(f"peak {peak:.1f} GMAC/s; all layers together {total:.1f} GMAC/s, {total / peak:.1%}")


if __name__ == "__main__":
    main()
