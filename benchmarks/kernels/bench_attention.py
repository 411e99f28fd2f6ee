"""Speed of attention, of matrix products of two activations and of recurrent layers, one thread.

    python benchmarks/kernels/bench_attention.py [--isa avx512] [--only bert] [--json]

`share` is that of the float32 multiply-add peak measured in the same run; packing, exponentials and
activations count as time but not as multiply-adds.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from timing import aligned, arguments, build, peak_gmacs, pointer, print_rows, seconds

from skive import pack

# name, heads, queries, keys, features
ATTENTION = [
    ("bert-base 128", 12, 128, 128, 64),
    ("minilm 128", 12, 128, 128, 32),
    ("vit-b/16", 12, 197, 197, 64),
    ("vit-tiny", 3, 197, 197, 64),
    ("decoder step", 12, 1, 512, 64),
    ("small transformer", 4, 32, 32, 32),
]
# name, M, K, N, B transposed
PRODUCTS = [
    ("matmul 384", 384, 384, 384, False),
    ("matmul 384 trans b", 384, 384, 384, True),
    ("matvec", 1, 1024, 1024, False),
]
# name, kernel, T, I, H, gates
RECURRENT = [("lstm speech", "lstm", 50, 40, 128, 4), ("gru denoise", "gru", 50, 42, 96, 3)]
# name, kernel, T, H, gates: the steps alone, in float32 and with 8-bit weights
STEPS = [("lstm 64", "lstm", 50, 64, 4), ("lstm 256", "lstm", 50, 256, 4), ("gru 128", "gru", 50, 128, 3),
         ("gru 512", "gru", 50, 512, 3)]


def main() -> None:
    args = arguments(__doc__)
    calls: list[tuple[str, str, float]] = []  # name, call, multiply-adds
    for name, h, nq, nk, d in ATTENTION:
        q, k = f"HeadStrides<0, {d}, {h * d}>", f"HeadStrides<0, {d}, {h * d}>"
        kind = f"attention<1, {h}, {nq}, {nk}, {d}, {d}, {q}, {k}, {k}, {q}, NoMask, false>"
        calls.append((name, f"{kind}::run(x, x, x, nullptr, y, scratch, Part{{}}, 0.125f)", 2.0 * h * nq * nk * d))
        shape = f"1, {h}, {nq}, {nk}, {d}, {d}, {q}, {k}, {k}, {q}"
        kind = f"quantized_attention<uint8_t, {shape}, NoMask, false, 128, 128, 128>"
        operands = "bytes(x), bytes(x), bytes(x), nullptr, reinterpret_cast<uint8_t*>(y), scratch, Part{}"
        calls.append((f"{name} int8", f"{kind}::run({operands}, 1e-5f, 1.5e-5f, 0.01f, 128)", 2.0 * h * nq * nk * d))
    for name, m, k_, n, trans in PRODUCTS:
        kind = f"matmul<Shape<>, {m}, {k_}, {n}, Strides<>, Strides<>, false, {str(trans).lower()}>"
        calls.append(
            (
                name,
                f"{kind}::run(x, x, y, scratch, Part{{}}, [](auto v, ptrdiff_t, int) {{ return v; }})",
                float(m * k_ * n),
            )
        )
    for name, kind, t, i, h, gates in RECURRENT:
        state = "x, x, nullptr" if kind == "lstm" else "x"
        calls.append(
            (
                name,
                f"{kind}<{t}, 1, {i}, {h}>::run(x, x, x, x, {state}, y, scratch, Part{{}})",
                float(t * gates * h * (i + h)),
            )
        )
    for name, kind, t, h, gates in STEPS:
        states, null = ("x, x", ", nullptr") if kind == "lstm" else ("x, x", "")
        macs = float(t * gates * h * h)
        real = f"{kind}_steps<{t}, 1, {h}>"
        calls.append((f"{name} f32", f"{real}::run(x, x, {states}{null}, y, scratch, Part{{}})", macs))
        block = pack.conv2d_block(gates * h, args.isa, 1, element_size=1, depth=h)
        bytes_ = "reinterpret_cast<const int8_t*>(x), zeros, x"
        calls.append((f"{name} int8", f"quantized_{kind}<{t}, 1, {h}, {block}>::run(x, {bytes_}, {states}, y, scratch, "
                      "Part{})", macs))
    calls = [call for call in calls if args.only in call[0]]
    body = "alignas(64) static float scratch[1 << 22];\nalignas(64) static const int32_t zeros[1 << 12] = {};\n"
    body += "static const uint8_t* bytes(const float* x) { return reinterpret_cast<const uint8_t*>(x); }\n"
    body += "".join(
        f'extern "C" void bench_{n}(const float* x, float* y, int samples, double* times) {{\n'
        f"  repeat([=] {{ {call[1]}; }}, samples, times);\n}}\n"
        for n, call in enumerate(calls)
    )
    library = build(["attention", "attention_integer", "rnn", "rnn_integer"], body, args.isa, args.opt)
    peak = peak_gmacs(library)
    rng = np.random.default_rng(0)
    x = aligned((rng.standard_normal(1 << 21) * 0.1).astype(np.float32))
    y = aligned(np.zeros(1 << 20, np.float32))
    rows: list[dict[str, Any]] = []
    for n, (name, _, macs) in enumerate(calls):
        times = seconds(getattr(library, f"bench_{n}"), pointer(x), pointer(y))
        speed = macs / times.min() * 1e-9
        rows.append(
            {
                "kernel": name,
                "us": float(times.min() * 1e6),
                "median us": float(np.median(times) * 1e6),
                "GMAC/s": float(speed),
                "share %": float(100 * speed / peak),
            }
        )
    print_rows(rows, as_json=args.json, isa=args.isa, peak=f"{peak:.1f} GMAC/s")


if __name__ == "__main__":
    main()
