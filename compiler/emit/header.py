"""The public C header of an artefact."""

from __future__ import annotations

from skive.emit import host
from skive.emit.host import POINTERS
from skive.emit.names import comment
from skive.plan import Plan


def public_header(plan: Plan, upper: str) -> str:
    """NAME.h: constants in the form `UPPER_...`, then the functions."""
    n = plan.name
    about = [f"{n}: a compiled network. Generated; do not edit.", ""]
    for kind, ports in (("input", plan.inputs), ("output", plan.outputs)):
        for i, p in enumerate(ports):
            real = f", real = {p.scale!r} * (integer - {p.zero})" if p.scale is not None else ""
            name = comment(p.name).replace("*", "?")
            about.append(f"{kind} {i}: {name} {p.dtype}[{','.join(map(str, p.shape))}]{real}")
    about += [
        "",
        "Tensors are dense, the last index runs fastest, and aligned to their elements. bool is one byte, 0 or 1.",
    ]
    if any(p.scale is not None for p in (*plan.inputs, *plan.outputs)):
        about += [
            "A real number becomes an integer as real / scale + zero: the quotient is rounded to the nearest integer",
            "(a half to the even one), and the sum is bounded to what the element type holds.",
        ]
    about.append(f"Memory: {len(plan.weights)} bytes of constant weights, {plan.arena_bytes} of arena from the caller.")
    lines = [f"/* {text} */" if text else "" for text in about]
    lines += [
        f"#ifndef {upper}_MODEL_H",
        f"#define {upper}_MODEL_H",
        "",
        *(["#include <stdint.h>", ""] if plan.exits else []),
        "#ifdef __cplusplus",
        'extern "C" {',
        "#endif",
        "",
        f"#define {upper}_INPUT_COUNT {len(plan.inputs)}",
        f"#define {upper}_OUTPUT_COUNT {len(plan.outputs)}",
    ]
    for kind, ports in (("INPUT", plan.inputs), ("OUTPUT", plan.outputs)):
        for i, p in enumerate(ports):
            lines.append(f"#define {upper}_{kind}{i}_BYTES {p.bytes}")
            if p.scale is not None:
                lines += [f"#define {upper}_{kind}{i}_SCALE {p.scale!r}f", f"#define {upper}_{kind}{i}_ZERO {p.zero}"]
    lines += [
        f"#define {upper}_ARENA_BYTES {plan.arena_bytes}",
        f"#define {upper}_ARENA_ALIGN 64",
        f"#define {upper}_BATCH_MAX {plan.batch_max or 0}",
        f"#define {upper}_THREADS {plan.threads}",
        "",
        "/* Error codes of the functions below; 0 is success. */",
        f"#define {upper}_ERROR_CPU 1   /* this processor lacks an instruction set the code needs */",
        f"#define {upper}_ERROR_NULL 2  /* a pointer is null */",
        f"#define {upper}_ERROR_ALIGN 3 /* the arena is not {upper}_ARENA_ALIGN-byte aligned */",
        f"#define {upper}_ERROR_BATCH 4 /* the batch is not 1 to {upper}_BATCH_MAX, or there is no such layer */",
        *([f"#define {upper}_ERROR_EXIT 5  /* there is no such exit to resume from */"] if plan.exits else []),
        "",
        "#if defined(__GNUC__)",
        f'#define {upper}_API __attribute__((visibility("default")))',
        "#else",
        f"#define {upper}_API",
        "#endif",
        "",
        "/* Runs the network once. No allocation, no global state: calls on separate arenas may run",
        "   at the same time. inputs and outputs point to one pointer per tensor; inputs are only read, and",
        "   an output overlaps no other tensor. The arena needs no initialisation and, unless exits are resumed,",
        f"   keeps nothing between calls; it may be null if {upper}_ARENA_BYTES is 0. */",
        f"{upper}_API int {n}_run({POINTERS});",
    ]
    if plan.batch_max:
        lines += [
            "",
            "/* The same for `batch` samples that lie one after the other in every tensor. */",
            f"{upper}_API int {n}_run_batch({POINTERS}, int batch);",
        ]
    if plan.exits:
        lines += host.header(plan, upper)
    lines += [
        "",
        "/* 1 if this processor has the instruction sets that the code needs. */",
        f"{upper}_API int {n}_cpu_supported(void);",
        "/* What an error code means, in words. */",
        f"{upper}_API const char* {n}_error(int code);",
        "",
        "/* Runs one layer, 0 to LAYER_COUNT - 1, on an arena in which the layers before it ran: for profiling. */",
        *(["/* The first ones run for every sample here; what they leave for the next is not that of a run. */"]
          if any(c.samples > 1 for c in plan.calls) else []),
        f"#define {upper}_LAYER_COUNT {len(plan.calls)}",
        f"{upper}_API int {n}_run_layer(int layer, {POINTERS});",
    ]
    if plan.threads > 1:
        lines += [
            "",
            "/* Starts and stops the worker threads. Without them a call computes the same, alone. */",
            f"{upper}_API void {n}_pool_start(int threads);",
            f"{upper}_API void {n}_pool_stop(void);",
        ]
    lines += ["", "#ifdef __cplusplus", "}", "#endif", "", f"#endif  /* {upper}_MODEL_H */", ""]
    return "\n".join(lines)
