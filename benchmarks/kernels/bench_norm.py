"""Speed of softmax, normalisation and reductions on rows of real networks, one thread.

    python benchmarks/kernels/bench_norm.py [--isa avx512] [--only softmax] [--json]

GB/s counts the input once and the output once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from timing import aligned, arguments, build, pointer, print_rows, seconds

PLAIN = "[](auto v, ptrdiff_t, int) { return v; }"  # an epilogue
BYTES = "[](auto v, ptrdiff_t, int) { return rounded<uint8_t, true>(v, 128); }"

# name, call, input floats, output floats
CALLS = [
    ("softmax resnet 1x1000", "softmax<1, 1000, 1>::run(x, y, Part{})", 1000, 1000),
    ("softmax ds-cnn 1x12", "softmax<1, 12, 1>::run(x, y, Part{})", 12, 12),
    ("softmax bert 12x128x128", "softmax<1536, 128, 1>::run(x, y, Part{})", 1536 * 128, 1536 * 128),
    ("softmax channels 1x21x4096", "softmax<1, 21, 4096>::run(x, y, Part{})", 21 * 4096, 21 * 4096),
    ("layer norm bert 128x768",
     f"layer_norm<128, 768>::run(x, x, x, y, Part{{}}, 1e-5f, {PLAIN})",
     128 * 768, 128 * 768),
    ("layer norm vit-tiny 197x192",
     f"layer_norm<197, 192>::run(x, x, x, y, Part{{}}, 1e-5f, {PLAIN})",
     197 * 192, 197 * 192),
    ("layer norm bert to bytes",
     f"layer_norm<128, 768>::run(x, x, x, reinterpret_cast<uint8_t*>(y), Part{{}}, 1e-5f, {BYTES})",
     128 * 768, 128 * 768 // 4),
    ("rms norm 128x768", f"rms_norm<128, 768>::run(x, x, y, Part{{}}, 1e-5f, {PLAIN})", 128 * 768, 128 * 768),
    ("l2 norm 512x128", f"l2_norm<512, 128>::run(x, y, Part{{}}, 1e-12f, {PLAIN})", 512 * 128, 512 * 128),
    (
        "instance norm 56x56x64",
        f"group_norm<1, 3136, 64, 64>::run(x, x, x, y, scratch, Part{{}}, 1e-5f, {PLAIN})",
        3136 * 64,
        3136 * 64,
    ),
    (
        "group norm 28x28x128, 32 groups",
        f"group_norm<1, 784, 128, 32>::run(x, x, x, y, scratch, Part{{}}, 1e-5f, {PLAIN})",
        784 * 128,
        784 * 128,
    ),
    (
        "group norm 56x56x64, one group",
        f"group_norm<1, 3136, 64, 1>::run(x, x, x, y, scratch, Part{{}}, 1e-5f, {PLAIN})",
        3136 * 64,
        3136 * 64,
    ),
    (
        "mean over pixels 49x1280",
        "reduce<Mean, float, Shape<1280>, Strides<1>, Shape<49>, Strides<1280>>::run(x, y, Part{})",
        49 * 1280,
        1280,
    ),
    (
        "sum of rows 1280x49",
        "reduce<Sum, float, Shape<1280>, Strides<49>, Shape<49>, Strides<1>>::run(x, y, Part{})",
        49 * 1280,
        1280,
    ),
    (
        "max of all 65536",
        "reduce<Max, float, Shape<>, Strides<>, Shape<65536>, Strides<1>>::run(x, y, Part{})",
        65536,
        1,
    ),
]


def main() -> None:
    args = arguments(__doc__)
    calls = [call for call in CALLS if args.only in call[0]]
    body = "alignas(64) [[maybe_unused]] static float scratch[4096];\n"
    body += "".join(
        f'extern "C" void bench_{i}(const float* x, float* y, int samples, double* times) {{\n'
        f"  repeat([=] {{ {call[1]}; }}, samples, times);\n}}\n"
        for i, call in enumerate(calls)
    )
    library = build(["softmax", "norm", "reduce"], body, args.isa, args.opt)
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for i, (name, _, inputs, outputs) in enumerate(calls):
        x = aligned(rng.standard_normal(inputs).astype(np.float32))
        y = aligned(np.zeros(outputs, np.float32))
        times = seconds(getattr(library, f"bench_{i}"), pointer(x), pointer(y))
        rows.append(
            {
                "kernel": name,
                "us": float(times.min() * 1e6),
                "median us": float(np.median(times) * 1e6),
                "GB/s": float((x.nbytes + y.nbytes) / times.min() * 1e-9),
            }
        )
    print_rows(rows, as_json=args.json, isa=args.isa)


if __name__ == "__main__":
    main()
