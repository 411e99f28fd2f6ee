"""Throughput of the elementwise functions and of the copies, one thread.

    python benchmarks/kernels/bench_math.py [--isa avx512] [--only exp] [--json]

Functions run over 4,096 floats that stay in L1; `cycles` would depend on the clock, so the unit is
nanoseconds per element. Transpositions: GB/s counts reading and writing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from timing import aligned, arguments, build, pointer, print_rows, seconds

COUNT = 4096
FUNCTIONS = {
    "add": "add(a, 1.0f)",
    "relu": "relu(a)",
    "exp": "exp_(a)",
    "log": "log_(abs_(a))",
    "tanh": "tanh_(a)",
    "erf": "erf_(a)",
    "sigmoid": "sigmoid(a)",
    "silu": "silu(a)",
    "gelu": "gelu(a)",
    "gelu_tanh": "gelu_tanh(a)",
    "softplus": "softplus(a)",
    "mish": "mish(a)",
    "elu": "elu(a, 1.0)",
    "hard_swish": "hard_swish(a)",
    "sin": "sin_(a)",
    "cos": "cos_(a)",
    "tan": "tan_(a)",
    "atan": "atan_(a)",
    "asin": "asin_(clip(a, -1.0, 1.0))",
    "sinh": "sinh_(a)",
    "asinh": "asinh_(a)",
    "pow 1.7": "pow_(abs_(a), 1.7f)",
    "sqrt": "sqrt_(abs_(a))",
}
# name, shape, permutation
TRANSPOSES = [
    ("transpose input to NHWC", (3, 224 * 224), (1, 0)),
    ("transpose output to NCHW", (56 * 56, 64), (1, 0)),
    ("transpose 512x512", (512, 512), (1, 0)),
    ("transpose heads", (197, 12, 64), (1, 0, 2)),
]


def main() -> None:
    args = arguments(__doc__)
    calls = [
        (name, f"vmap<Shape<{COUNT}>, Strides<1>>::run(y, Part{{}}, [](auto a) {{ return {text}; }}, x)", COUNT)
        for name, text in FUNCTIONS.items()
    ]
    for name, shape, perm in TRANSPOSES:
        tags = f"Shape<{', '.join(map(str, shape))}>, Perm<{', '.join(map(str, perm))}>"
        calls.append((name, f"transpose<float, {tags}>::run(y, x, Part{{}})", int(np.prod(shape))))
    calls = [call for call in calls if args.only in call[0]]
    body = "".join(
        f'extern "C" void bench_{i}(const float* x, float* y, int samples, double* times) {{\n'
        f"  repeat([=] {{ {text}; }}, samples, times);\n}}\n"
        for i, (_, text, _) in enumerate(calls)
    )
    library = build(["functions", "map", "transpose"], body, args.isa, args.opt)
    rows: list[dict[str, Any]] = []
    for i, (name, _, size) in enumerate(calls):
        x = aligned(np.linspace(-5, 5, size, dtype=np.float32))
        y = aligned(np.zeros(size, np.float32))
        times = seconds(getattr(library, f"bench_{i}"), pointer(x), pointer(y))
        rows.append(
            {
                "function": name,
                "ns/element": float(times.min() / size * 1e9),
                "median": float(np.median(times) / size * 1e9),
                "GB/s": float(8 * size / times.min() * 1e-9),
            }
        )
    print_rows(rows, as_json=args.json, isa=args.isa)


if __name__ == "__main__":
    main()
