"""Speed of the integer depthwise convolution beside float32, on layers of real networks, one thread.

    python benchmarks/kernels/bench_depthwise_integer.py [--isa avx512vnni] [--only mobilenetv2] [--json]

The epilogue is a ReLU: that of bytes in the form that compiler/lower/shifted.py gives it, with one factor per
channel; 16 bits are requantized without it.
GMAC/s counts all taps, also those in the padding.
"""

from __future__ import annotations

import argparse

import numpy as np
from bench_depthwise import LAYERS, Layer, square
from driver import INTEGER_ISA_FLAGS, cpu_isas
from timing import aligned, build, pointer, print_rows, seconds

from skive import pack
from skive.lower.shifted import START

MORE = [
    square("mobilenetv2", 14, 576, 3, 1),
    square("vww", 48, 16, 3, 2),
    square("vww", 24, 32, 3, 1),
    square("vww", 12, 64, 3, 1),
    square("vww", 6, 128, 3, 1),
    square("vww", 3, 256, 3, 1),
]

_BODY = """
extern "C" void f32_%(i)d(const float* x, const float* w, const float* bias, float* y, int samples,
                          double* times) {
  repeat([=] { %(f32)s::run(x, w, bias, y, nullptr, Part{}, Relu{}); }, samples, times);
}
template <class T>
struct Requantize%(i)d {
  const float* factor;
  const float* offset;
  template <int N>
  auto operator()(IVec<N> sum, ptrdiff_t, int c) const {
    if constexpr (sizeof(T) == 1)
      return rounded<T, true>(scaled_sum(sum, load<N>(factor + c), load<N>(offset + c)), 0);
    else
      return rounded<T>(to_float(sum) * load<N>(factor + c), 0);
  }
};
"""
_INTEGER = """
extern "C" void %(name)s_%(i)d(const %(x)s* x, const %(w)s* w, const int32_t* bias, %(x)s* y,
                               const float* factor, const float* offset, int samples, double* times) {
  repeat([=] { %(type)s::run(x, w, bias, y, nullptr, Part{}, Requantize%(i)d<%(x)s>{factor, offset}); },
         samples, times);
}
"""
ELEMENTS = {"u8": ("uint8_t", np.uint8, 3), "i16": ("int16_t", np.int16, 0)}
CTYPES = {np.dtype(np.int8): "int8_t", np.dtype(np.int16): "int16_t"}


def integer_type(layer: Layer, element: str, zero: int) -> str:
    c = layer.image[2]
    return f"{layer.cpp().removesuffix('>')}, {c}, {c}, {element}, {zero}>"


def attrs(layer: Layer) -> dict[str, tuple[int, ...]]:
    return {"stride": (layer.stride, layer.stride), "pad": layer.pad, "dilation": (1, layer.dilation)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--isa", choices=list(INTEGER_ISA_FLAGS), default=cpu_isas(INTEGER_ISA_FLAGS)[0])
    parser.add_argument("--only", default="", help="layers whose name contains this")
    parser.add_argument("--opt", default="-O2", help="optimisation level")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    layers = sorted((layer for layer in [*LAYERS, *MORE] if args.only in layer.name), key=lambda v: v.network)
    rng = np.random.default_rng(0)
    body, operands = "", []
    for i, layer in enumerate(layers):
        body += _BODY % {"i": i, "f32": layer.cpp()}
        taps = rng.integers(-100, 100, (layer.image[2], *layer.kernel))
        row = {}
        for name, (element, dtype, zero) in ELEMENTS.items():
            call = pack.pack_depthwise_u8 if name == "u8" else pack.pack_depthwise_i16
            starts = np.full(layer.output[2], START if name == "u8" else 0, np.int32)
            whole = taps.astype(np.int8 if name == "u8" else np.int16)
            weights, bias = call(whole, starts, zero, attrs(layer), args.isa)
            body += _INTEGER % {"name": name, "i": i, "x": element, "w": CTYPES[weights.dtype],
                                "type": integer_type(layer, element, zero)}  # fmt: skip
            x = rng.integers(0, 255, layer.image).astype(dtype)
            factor = np.full(layer.output[2], 1e-3, np.float32)
            row[name] = (x, weights, bias, np.zeros(layer.output, dtype), factor, factor * np.float32(-(2.0**23)))
        x = rng.standard_normal(layer.image).astype(np.float32)
        w, bias = pack.pack_depthwise(taps.astype(np.float32), None)
        row["f32"] = (x, w, bias, np.zeros(layer.output, np.float32))
        operands.append(row)
    library = build(["depthwise_integer", "math"], body, args.isa, args.opt)
    rows = []
    for i, layer in enumerate(layers):
        best = {}
        for name, arrays in operands[i].items():
            placed = [cast_aligned(a) for a in arrays]
            best[name] = float(seconds(getattr(library, f"{name}_{i}"), *map(pointer, placed)).min())
        outputs = float(np.prod(layer.output))
        macs = outputs * float(np.prod(layer.kernel))
        rows.append({
            "layer": layer.name, "f32 us": best["f32"] * 1e6, "u8 us": best["u8"] * 1e6, "i16 us": best["i16"] * 1e6,
            "f32 ns/64": best["f32"] * 64e9 / outputs, "u8 ns/64": best["u8"] * 64e9 / outputs,
            "i16 ns/64": best["i16"] * 64e9 / outputs, "u8 GMAC/s": macs / best["u8"] * 1e-9,
            "i16 GMAC/s": macs / best["i16"] * 1e-9, "f32/u8": best["f32"] / best["u8"],
            "f32/i16": best["f32"] / best["i16"],
        })  # fmt: skip
    print_rows(rows, as_json=args.json, isa=args.isa)


def cast_aligned(array: np.ndarray) -> np.ndarray:
    """A copy at a 64-byte boundary."""
    raw = np.ascontiguousarray(array).view(np.uint8).ravel()
    words = np.zeros(-(-raw.size // 4), np.float32)
    words.view(np.uint8)[: raw.size] = raw
    return aligned(words)


if __name__ == "__main__":
    main()
