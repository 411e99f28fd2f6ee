"""Speed of pooling on layers of real networks, one thread.

    python benchmarks/kernels/bench_pool.py [--isa avx512] [--only resnet] [--json]

GB/s counts the input once and the output once.
"""

from __future__ import annotations

import numpy as np
from timing import aligned, arguments, build, pointer, print_rows, seconds

# name, height, width, channels, kernel, stride, padding on every side
WINDOWS = [
    ("resnet50 max", 112, 112, 64, 3, 2, 1),
    ("vgg16 max", 224, 224, 64, 2, 2, 0),
    ("vgg16 max", 28, 28, 512, 2, 2, 0),
    ("squeezenet max", 54, 54, 96, 3, 2, 0),
    ("googlenet max", 28, 28, 192, 3, 1, 1),
    ("densenet average", 56, 56, 128, 2, 2, 0),
    ("inception average", 35, 35, 192, 3, 1, 1),
]
# name, height, width, channels
IMAGES = [
    ("resnet50 global average", 7, 7, 2048),
    ("mobilenetv2 global average", 7, 7, 1280),
    ("efficientnet-b0 global average", 112, 112, 32),
    ("efficientnet-b0 global average", 28, 28, 240),
    ("ds-cnn global average", 25, 5, 64),
    ("global max", 14, 14, 512),
]

_BODY = """
extern "C" void bench_%d(const float* x, float* y, int samples, double* times) {
  repeat([=] { %s::run(x, y, nullptr, Part{}, Relu{}); }, samples, times);
}
"""


def main() -> None:
    args = arguments(__doc__)
    cases: list[tuple[str, str, int, int]] = []  # name, C++ type, input floats, output floats
    for name, h, w, c, k, s, p in WINDOWS:
        kind = "max_pool2d" if "max" in name else "avg_pool2d"
        cases.append((
            f"{name} {h}x{w}x{c} {k}x{k} s{s}",
            f"{kind}<Image<1, {h}, {w}, {c}>, Kernel<{c}, {k}, {k}>, Stride<{s}, {s}>, "
            f"Pad<{p}, {p}, {p}, {p}>>",
            h * w * c, ((h + 2 * p - k) // s + 1) * ((w + 2 * p - k) // s + 1) * c,
        ))  # fmt: skip
    for name, h, w, c in IMAGES:
        kind = "global_max_pool2d" if "max" in name else "global_avg_pool2d"
        cases.append((f"{name} {h}x{w}x{c}", f"{kind}<Image<1, {h}, {w}, {c}>>", h * w * c, c))
    cases = [case for case in cases if args.only in case[0]]
    library = build(
        ["pool"], "".join(_BODY % (i, case[1]) for i, case in enumerate(cases)), args.isa, args.opt
    )
    rng = np.random.default_rng(0)
    rows = []
    for i, (name, _, inputs, outputs) in enumerate(cases):
        x = aligned(rng.standard_normal(inputs).astype(np.float32))
        y = aligned(np.zeros(outputs, np.float32))
        times = seconds(getattr(library, f"bench_{i}"), pointer(x), pointer(y))
        rows.append({
            "layer": name, "us": float(times.min() * 1e6),
            "median us": float(np.median(times) * 1e6),
            "GB/s": float((x.nbytes + y.nbytes) / times.min() * 1e-9),
        })  # fmt: skip
    print_rows(rows, as_json=args.json, isa=args.isa)


if __name__ == "__main__":
    main()
