"""Speed of what surrounds integer contractions, one thread: maps of quantized values, tables, pooling,
resampling and movement of bytes and words.

    python benchmarks/kernels/bench_quantize.py [--isa avx512] [--only map] [--json]

GB/s counts every operand and the result once. `memcpy` moves as many bytes as a map of 256 KiB reads and
writes: what the caches allow.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from timing import aligned, arguments, build, pointer, print_rows, seconds

COUNT = 262144  # elements: inputs and result of bytes lie in L2
_DENSE = f"Shape<{COUNT}>, Strides<1>"
# name, statement over the byte pointers x and y (f, i, h: the same as float, int32_t, int16_t), bytes moved
CALLS: list[tuple[str, str, int]] = [
    ("map u8 relu", f"vmap<{_DENSE}>::run(y, Part{{}}, [](auto a) {{ return requantize<uint8_t>("
     "relu(dequantize(a, 0.1f, 7)), 9.7f, 3); }, x)", 2 * COUNT),
    ("map u8 + u8", f"vmap<{_DENSE}, Strides<1>>::run(y, Part{{}}, [](auto a, auto b) {{ return quantize<uint8_t>("
     "add(dequantize(a, 0.1f, 7), dequantize(b, 0.2f, 1)), 0.13f, 3); }, x, x + (1 << 20))", 3 * COUNT),
    ("map i16 + i16", f"vmap<{_DENSE}, Strides<1>>::run(yh, Part{{}}, [](auto a, auto b) {{ return quantize<int16_t>("
     "add(dequantize(a, 0.1f, 0), dequantize(b, 0.2f, 0)), 0.13f, 0); }, xh, xh + (1 << 19))", 6 * COUNT),
    ("map quantize f32 to u8", f"vmap<{_DENSE}>::run(y, Part{{}}, [](auto a) {{ "
     "return quantize<uint8_t>(a, 0.13f, 3); }, xf)", 5 * COUNT),
    ("map dequantize u8 to f32", f"vmap<{_DENSE}>::run(yf, Part{{}}, [](auto a) {{ "
     "return dequantize(a, 0.13f, 3); }, x)", 5 * COUNT),
    ("map requantize_fixed i32 to u8", f"vmap<{_DENSE}>::run(y, Part{{}}, [](auto a) {{ return "
     "requantize_fixed<uint8_t>(a, 1518500250, 38, 3); }, xi)", 5 * COUNT),
    ("map silu i32 to u8", f"vmap<{_DENSE}>::run(y, Part{{}}, [](auto a) {{ return quantize<uint8_t>("
     "silu(dequantize(a, 0.001f, 0)), 0.13f, 3); }, xi)", 5 * COUNT),
    ("map piecewise 2 of 32 i32 to u8", f"vmap<{_DENSE}>::run(y, Part{{}}, [](auto a) {{ "
     "alignas(64) static constexpr float t[96] = {1.0f}; return requantize<uint8_t>("
     "piecewise<-16, 32, 2>(dequantize(a, 0.001f, 0), t), 1.0f, 3); }, xi)", 5 * COUNT),
    ("table u8 to u8", f"lookup<{_DENSE}>::run(y, Part{{}}, table, x)", 2 * COUNT),
    ("memcpy", f"__builtin_memcpy(y, x, {COUNT}); __asm__(\"\" ::: \"memory\")", 2 * COUNT),
    ("transpose u8 image to NHWC", "transpose<uint8_t, Shape<3, 50176>, Perm<1, 0>>::run(y, x, Part{})", 301056),
    ("transpose u8 3136x64", "transpose<uint8_t, Shape<3136, 64>, Perm<1, 0>>::run(y, x, Part{})", 401408),
    ("transpose i16 3136x64", "transpose<int16_t, Shape<3136, 64>, Perm<1, 0>>::run(yh, xh, Part{})", 802816),
    ("transpose u8 depth to space 3", "transpose<uint8_t, Shape<100, 100, 3, 3>, Perm<0, 2, 1, 3>>::run(y, x, Part{})",
     180000),
    ("pad u8 224x224x3", "pad<uint8_t, PadMode::constant, Shape<1, 224, 224, 3>, Shape<1, 226, 226, 3>, "
     "Strides<0, 1, 1, 0>>::run(y, x, uint8_t{3}, Part{})", 150528 + 153228),
]  # fmt: skip
# name, height and width, channels, kernel, stride, padding
MAXIMA = [
    ("resnet50", 112, 64, 3, 2, 1),
    ("vgg16", 28, 512, 2, 2, 0),
    ("squeezenet", 54, 96, 3, 2, 0),
    ("googlenet", 28, 192, 3, 1, 1),
    ("yolox", 13, 256, 5, 1, 2),
]
SUMS = [("resnet50", 7, 2048), ("mobilenetv2", 7, 1280), ("efficientnet-b0", 112, 32), ("resnet8", 8, 64)]


def calls() -> list[tuple[str, str, int]]:
    """CALLS and one entry per pooling layer."""
    rows = list(CALLS)
    requantize = "[](auto v, ptrdiff_t, int) { return requantize<uint8_t>(v, 0.01f, 3); }"
    for name, size, c, k, s, p in MAXIMA:
        out = (size + 2 * p - k) // s + 1
        kernel = (f"max_pool2d<Image<1, {size}, {size}, {c}>, Kernel<{c}, {k}, {k}>, Stride<{s}, {s}>, "
                  f"Pad<{p}, {p}, {p}, {p}>>")  # fmt: skip
        rows.append((f"max u8 {name} {size}x{size}x{c} {k}x{k} s{s}", f"{kernel}::run(x, y, nullptr, Part{{}})",
                     (size * size + out * out) * c))  # fmt: skip
    for name, size, c in SUMS:
        kernel = (f"sum_pool2d<Image<1, {size}, {size}, {c}>, Kernel<{c}, {size}, {size}>, Stride<1, 1>, "
                  f"Pad<0, 0, 0, 0>, Dilation<1, 1>, {c}, {c}, uint8_t, 3>")  # fmt: skip
        rows.append((f"global mean u8 {name} {size}x{size}x{c}",
                     f"{kernel}::run(x, y, nullptr, Part{{}}, {requantize})", size * size * c + c))  # fmt: skip
    return rows


_BODY = """
extern "C" void bench_%d(const uint8_t* x, uint8_t* y, const uint8_t* table, int samples, double* times) {
  [[maybe_unused]] const float* xf = reinterpret_cast<const float*>(x);
  [[maybe_unused]] const int32_t* xi = reinterpret_cast<const int32_t*>(x);
  [[maybe_unused]] const int16_t* xh = reinterpret_cast<const int16_t*>(x);
  [[maybe_unused]] float* yf = reinterpret_cast<float*>(y);
  [[maybe_unused]] int16_t* yh = reinterpret_cast<int16_t*>(y);
  static_cast<void>(table);
  repeat([=] { %s; }, samples, times);
}
"""


def main() -> None:
    args = arguments(__doc__)
    chosen = [call for call in calls() if args.only in call[0]]
    body = "".join(_BODY % (i, text) for i, (_, text, _) in enumerate(chosen))
    library = build(["functions", "map", "pool", "transpose", "copy"], body, args.isa, args.opt)
    rng = np.random.default_rng(0)
    x = aligned(rng.integers(0, 2**30, 1 << 20).astype(np.int32).view(np.float32))
    y = aligned(np.zeros(1 << 20, np.float32))
    table = aligned(rng.integers(0, 2**30, 64).astype(np.int32).view(np.float32))
    rows: list[dict[str, Any]] = []
    for i, (name, _, moved) in enumerate(chosen):
        times = seconds(getattr(library, f"bench_{i}"), pointer(x), pointer(y), pointer(table))
        rows.append(
            {
                "kernel": name,
                "us": float(times.min() * 1e6),
                "median us": float(np.median(times) * 1e6),
                "GB/s": float(moved / times.min() * 1e-9),
            }
        )
    print_rows(rows, as_json=args.json, isa=args.isa)


if __name__ == "__main__":
    main()
