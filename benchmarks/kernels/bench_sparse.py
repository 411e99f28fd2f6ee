"""Block-sparse convolution layers against the dense kernel, one thread: time and speed-up by share of zeros.

    python benchmarks/kernels/bench_sparse.py --only resnet50 --block 16 --fractions 0.5,0.75,0.9
    python benchmarks/kernels/bench_sparse.py --element float32 --rows --depth 1 --block 1 --only mobilenetv2 \
        --fractions 0.3,0.5,0.6,0.7,0.8,0.9,0.95
    python benchmarks/kernels/bench_sparse.py --only resnet50 --n-of-m 2:4,1:4 --depths 64 --group 2

Blocks are drawn at random; the epilogue is that of bench_conv_integer.py (uint8) or a factor and ReLU (float32).
The dense kernel is the direct one. `--fit` prints what `Costs` in compiler/lower/sparse.py holds: by least squares of
relative errors, a multiply-add of the sparse kernel and an output of each, in multiply-adds of the dense one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from bench_conv import _PRELUDE, LAYERS, Layer, cpp
from bench_conv_integer import aligned
from numpy.typing import NDArray

from skive import gathered_weights, pack, sparse_weights, sparsity

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "kernels"))
from driver import INTEGER_ISA_FLAGS, compile_library, cpu_isas, pointer  # noqa: E402

_RUN = {
    "uint8": """[=](auto acc, ptrdiff_t, int channel) {
      return rounded<uint8_t, true>(to_float(acc) * load<decltype(acc)::lanes>(factor + channel), 3);
    }""",
    "float32": """[=](auto acc, ptrdiff_t, int channel) {
      return vmax(acc * load<decltype(acc)::lanes>(factor + channel), zero<decltype(acc)::lanes>());
    }""",
}
_LAYER = """
using K%(i)d = %(type)s;
extern "C" long scratch_%(i)d() { return static_cast<long>(K%(i)d::scratch_bytes(1)); }
extern "C" void bench_%(i)d(const %(x)s* x, const %(w)s* w, [[maybe_unused]] const int32_t* index,
                            const %(s)s* bias, %(x)s* y, void* scratch, const float* factor, int samples,
                            double* seconds) {
  repeat([=] {
    K%(i)d::run(x, w, %(index)s bias, y, scratch, Part{}, %(epilogue)s);
  }, samples, 2e-4, seconds);
}
"""


def window(layer: Layer) -> dict[str, tuple[int, ...]]:
    return {"stride": layer.stride, "pad": layer.pad, "dilation": (1, 1)}


def drawn(layer: Layer, block: int, depth: int, fraction: float, element: str) -> NDArray[np.generic]:
    """Weights with the given share of blocks zero, the same number in every block of output channels."""
    rng = np.random.default_rng(0)
    oc, kh, kw = layer.kernel
    ic = layer.image[3]
    groups = -(-ic // depth)
    zero = round(fraction * kh * kw * groups)
    w = rng.integers(-100, 100, (oc, kh * kw, groups * depth))
    for b in range(0, oc, block):
        gone = rng.permutation(kh * kw * groups)[:zero]
        for g in gone:
            w[b : b + block, g // groups, g % groups * depth : (g % groups + 1) * depth] = 0
    return w[:, :, :ic].reshape(oc, kh, kw, ic).astype(np.int8 if element == "uint8" else np.float32)


def drawn_n_of_m(layer: Layer, block: int, pattern: str) -> NDArray[np.int8]:
    """Weights of which `block` output channels keep the same n of each m input channels."""
    rng = np.random.default_rng(0)
    oc, kh, kw = layer.kernel
    ic, form = layer.image[3], sparsity.Pattern.parse(pattern)
    stays = sparsity.kept_blocks(rng.random((-(-oc // block), kh * kw, ic)), form, 0)
    w = rng.integers(1, 100, (oc, kh * kw, ic)) * np.repeat(stays, block, 0)[:oc]
    return w.reshape(oc, kh, kw, ic).astype(np.int8)


def fitted(rows: list[dict[str, Any]], gathered: bool) -> tuple[float, ...]:
    """(cost of a kept multiply-add, of an output of the sparse and of the dense kernel), in dense multiply-adds.

    With `gathered` the second and third are those of a place and of a lane of it, for each output.
    """

    def solved(terms: list[tuple[float, ...]]) -> NDArray[np.float64]:
        *counts, us = np.array(terms).T
        return np.linalg.lstsq(np.stack(counts, 1) / us[:, None], np.ones(len(us)), rcond=None)[0]

    dense = solved([(r["macs"], r["outputs"], r["dense_us"]) for r in rows])
    if gathered:
        found = solved([(s["macs"], s["places"], s["lanes"], r["outputs"], s["us"]) for r in rows for s in r["sparse"]])
        return *(found / dense[0]).tolist(), float(dense[1] / dense[0])
    sparse = solved([(r["macs"] * s["kept"], r["outputs"], s["us"]) for r in rows for s in r["sparse"]])
    return float(sparse[0] / dense[0]), float(sparse[1] / dense[0]), float(dense[1] / dense[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--isa", choices=list(INTEGER_ISA_FLAGS), default=cpu_isas(INTEGER_ISA_FLAGS)[0])
    parser.add_argument("--element", choices=("uint8", "float32"), default="uint8")
    parser.add_argument("--only", help="networks or layers whose name contains this")
    parser.add_argument("--block", type=int, default=16, help="output channels of a block of weights")
    parser.add_argument("--group", type=int, default=1, help="neighbouring blocks whose outputs are stored together")
    parser.add_argument("--rows", action="store_true", help="spmm.h: float32, 1x1 windows, single input channels")
    parser.add_argument("--depth", type=int, default=4, help="input channels of a block of weights")
    parser.add_argument("--fractions", default="0,0.5,0.75,0.9", help="shares of zeros")
    parser.add_argument("--n-of-m", help="instead of --fractions: n:m patterns, uint8")
    parser.add_argument("--depths", default="64", help="bytes of a place of --n-of-m")
    parser.add_argument("--samples", type=int, default=30)
    parser.add_argument("--optimize", default="-O2")
    parser.add_argument("--fit", action="store_true", help="print the costs that the forecast rests on")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    patterns = options.n_of_m.split(",") if options.n_of_m else []
    fractions = [] if patterns else [float(f) for f in options.fractions.split(",")]
    integer = options.element == "uint8"
    depths = [int(d) for d in options.depths.split(",")]
    types = {"x": "uint8_t", "w": "int8_t", "s": "int32_t"} if integer else dict.fromkeys("xws", "float")
    size, depth = (1, options.depth) if integer else (4, options.depth)

    lanes = {"avx512vnni": 16, "avx512": 16, "avx2": 8, "generic": 4}[options.isa]
    layers = [la for la in LAYERS if la.image[3] >= depth
              and (not options.rows or (la.kernel[1:] == (1, 1) and la.stride == (1, 1)))
              and (not options.only or options.only in f"{la.network} {la.name}")]  # fmt: skip
    body, cases = "", []
    for layer in layers:
        ic, oc = layer.image[3], layer.kernel[0]
        pixels = int(np.prod(layer.output[:3]))
        length = ic * layer.kernel[1] * layer.kernel[2]
        block = pack.conv2d_block(oc, options.isa, pixels, element_size=size, depth=length)
        dense_type = f"{cpp(layer, block)}, {ic}, {oc}" + (f", {types['x']}, 3" if integer else "")
        names = {**types, "epilogue": _RUN[options.element]}
        body += _LAYER % {"i": len(cases), "type": f"conv2d<{dense_type}>", "index": "", **names}
        w = drawn(layer, 16, depth, 0, options.element)
        cases.append((layer, w, None, block, None))
        for n_of_m, deep in itertools.product(patterns, depths):
            if deep > ic:
                continue
            w = drawn_n_of_m(layer, options.block, n_of_m)
            pitch = sparse_weights.copied_pitch(layer.image, window(layer), ic, size)
            form = sparsity.Pattern.parse(n_of_m)
            keep = form.keep * gathered_weights.LANE // form.group
            tags = cpp(layer, options.block).rpartition(",")[0]
            blocks = f"{options.block}, {options.group}, {deep}"
            text = f"sparse_conv2d<{tags}, {blocks}, {ic}, {oc}, {pitch}, 8, {types['x']}, 3, {keep}>"
            body += _LAYER % {"i": len(cases), "type": text, "index": "index,", **names}
            cases.append((layer, w, pitch, options.block, (deep, keep)))
        for f in fractions:
            w = drawn(layer, options.block, depth, f, options.element)
            pitch = sparse_weights.copied_pitch(layer.image, window(layer), ic, size)
            kept = round(16 * float(sparse_weights.kept_places(w, options.block, depth).mean()))
            tags = cpp(layer, options.block).rpartition(",")[0]
            if options.rows:
                text = f"sparse_rows<{int(np.prod(layer.output[:3]))}, {ic}, {oc}, {options.block}>"
                body += _LAYER % {"i": len(cases), "type": text, "index": "index,", **names}
                cases.append((layer, w, 0, options.block, None))
                continue
            blocks = f"{options.block}, {options.group}, {depth}"
            text = f"sparse_conv2d<{tags}, {blocks}, {ic}, {oc}, {pitch}, {kept}, {types['x']}, 3>"
            body += _LAYER % {"i": len(cases), "type": text, "index": "index,", **names}
            cases.append((layer, w, pitch, options.block, None))
    with tempfile.TemporaryDirectory() as folder:
        headers = "".join(f'#include "skive/{name}.h"\n' for name in ("math", "sparse", "spmm"))
        source = headers + _PRELUDE + body + "} }"
        lib = compile_library(source, options.isa, Path(folder), flags=(options.optimize, "-ffp-contract=off"))
        rows = []
        for i, (layer, w, pitch, block, gathered) in enumerate(cases):
            rng = np.random.default_rng(0)
            x = aligned(rng.integers(0, 100, layer.image).astype(np.uint8 if integer else np.float32))
            index: NDArray[np.generic] = np.zeros(1, np.int32)
            if pitch is None:
                packed = pack.pack_conv2d_u8(w, block) if integer else pack.pack_conv2d(w, block)
            elif gathered:
                packed, index = gathered_weights.pack_gathered(
                    w, block, *gathered, layer.image, window(layer), layer.image[3], pitch, options.isa
                )
            elif options.rows:
                packed, index = sparse_weights.pack_rows(w.reshape(len(w), -1), block, lanes)
            else:
                packed, index = sparse_weights.pack_sparse(
                    w, block, depth, layer.image, window(layer), layer.image[3], pitch
                )
            bias = aligned(pack.pack_bias_i32(None, w, 3, block) if integer
                           else pack.pack_bias(np.zeros(w.shape[0], np.float32), max(4, block)))  # fmt: skip
            packed, index = aligned(packed), aligned(index)
            factor = aligned(np.full(w.shape[0], 1e-3, np.float32))
            y = aligned(np.zeros(layer.output, x.dtype))
            scratch = aligned(np.zeros(getattr(lib, f"scratch_{i}")(), np.uint8))
            seconds = np.zeros(options.samples)
            getattr(lib, f"bench_{i}")(*map(pointer, (x, packed, index, bias, y, scratch, factor)),
                                       options.samples, pointer(seconds))  # fmt: skip
            us = float(seconds.min()) * 1e6
            if pitch is None:
                dense = us
                rows.append({"network": layer.network, "layer": layer.name, "macs": layer.macs,
                             "outputs": int(np.prod(layer.output)), "dense_us": us, "sparse": []})
                line = f"{layer.network:12} {layer.name:28} dense {us:9.1f} us {layer.macs / us / 1e3:6.1f} GMAC/s "
            else:
                left = float((w != 0).mean())
                of_each = {}
                if gathered:
                    places = (len(index) - 1 - -(-len(w) // block)) * block * rows[-1]["outputs"] / len(w)
                    lanes_read = places * gathered[0] / gathered_weights.LANE
                    of_each = {"depth": gathered[0], "places": places, "lanes": lanes_read,
                               "macs": lanes_read * gathered[1]}  # fmt: skip
                rows[-1]["sparse"].append({"kept": left, "us": us, "speedup": dense / us, **of_each})
                line += f" | {1 - left:4.0%} {us:8.1f} us {dense / us:5.2f}x"
            if not options.json and (i + 1 == len(cases) or cases[i + 1][2] is None):
                print(line, flush=True)
    if not options.json and len({len(r["sparse"]) for r in rows}) == 1:
        dense = sum(r["dense_us"] for r in rows)
        totals = [sum(s["us"] for s in column) for column in zip(*(r["sparse"] for r in rows), strict=True)]
        print(f"all together: dense {dense:.1f} us" + "".join(f" | {us:.1f} us {dense / us:.2f}x" for us in totals))
    if options.fit:
        names = ("kept", *(["place", "lane"] if patterns else []), "output", "dense output")
        print(", ".join(f"{name} {v:.2f}" for name, v in zip(names, fitted(rows, bool(patterns)), strict=True)))
    if options.json:
        print(json.dumps({"isa": options.isa, "element": options.element, "block": options.block,
                          "depth": depth, "layers": rows}, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
