"""Many small kernel calls compiled into one translation unit, run, and compared with NumPy."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from driver import compile_library
from numpy.typing import NDArray

CTYPE = {
    np.dtype(np.float32): "float",
    np.dtype(np.float64): "double",
    np.dtype(np.bool_): "uint8_t",
    np.dtype(np.int8): "int8_t",
    np.dtype(np.uint8): "uint8_t",
    np.dtype(np.int16): "int16_t",
    np.dtype(np.uint16): "uint16_t",
    np.dtype(np.int32): "int32_t",
    np.dtype(np.uint32): "uint32_t",
    np.dtype(np.int64): "int64_t",
    np.dtype(np.uint64): "uint64_t",
}
_GUARD = 64  # bytes of canary on either side of a buffer
_CANARY = 0xA5


def angle(name: str, *items: object) -> str:
    """`name<items...>` as C++ text."""
    return f"{name}<{', '.join(map(str, items))}>"


@dataclass
class Case:
    """One call `text` of a kernel. In the text, x0, x1 ... are the inputs, y0, y1 ... the results,
    `scratch` and `part` what their names say. `scratch_of` is the kernel type that has
    `scratch_bytes`, if it needs scratch. Results may differ from `want` by `rtol` of the element
    plus `atol` of the largest finite magnitude; 0 and 0 demand equal values."""

    text: str
    inputs: Sequence[NDArray[np.generic]]
    want: Sequence[NDArray[np.generic]]
    scratch_of: str = ""
    rtol: float = 0.0
    atol: float = 0.0
    parts: tuple[int, ...] = field(default=(1, 3))


class _Guarded:
    """A copy of an array between canaries, 4 bytes past a 64-byte boundary (user buffers are not
    aligned; 8-byte elements: 8 past)."""

    def __init__(self, array: NDArray[np.generic]) -> None:
        start = max(4, array.dtype.itemsize)
        self._raw = np.full(array.nbytes + 2 * _GUARD + 128, _CANARY, np.uint8)
        self._begin = -self._raw.ctypes.data % 64 + _GUARD + start
        self._end = self._begin + array.nbytes
        self.view = self._raw[self._begin : self._end].view(array.dtype).reshape(array.shape)
        self.view[...] = array

    @property
    def address(self) -> int:
        return self._raw.ctypes.data + self._begin

    def intact(self) -> bool:
        return bool((self._raw[: self._begin] == _CANARY).all() and (self._raw[self._end :] == _CANARY).all())


def _source(cases: Sequence[Case], headers: Sequence[str], prelude: str) -> str:
    lines = [f'#include "skive/{h}"' for h in headers]
    lines += ["using namespace skive;\n", prelude]
    for n, case in enumerate(cases):
        arguments = [
            f"[[maybe_unused]] auto* x{i} = static_cast<const {CTYPE[a.dtype]}*>(p[{i}]);"
            for i, a in enumerate(case.inputs)
        ]
        arguments += [
            f"[[maybe_unused]] auto* y{i} = static_cast<{CTYPE[a.dtype]}*>(p[{len(case.inputs) + i}]);"
            for i, a in enumerate(case.want)
        ]
        need = f"{case.scratch_of}::scratch_bytes(parts)" if case.scratch_of else "parts * 0"
        lines += [
            f'extern "C" void case_{n}(void* const* p, [[maybe_unused]] void* scratch, int index, int count) {{',
            "  [[maybe_unused]] const Part part{index, count};",
            *("  " + a for a in arguments),
            f"  {case.text};",
            "}",
            f'extern "C" size_t scratch_{n}([[maybe_unused]] int parts) {{ return {need}; }}\n',
        ]
    return "\n".join(lines)


def _agree(got: NDArray[np.generic], want: NDArray[np.generic], case: Case) -> bool:
    if case.rtol == 0 and case.atol == 0:
        return bool(np.array_equal(got, want, equal_nan=got.dtype.kind == "f"))
    exact = want.astype(np.float64)
    finite = np.abs(exact[np.isfinite(exact)])
    scale = float(finite.max()) if finite.size else 0.0
    return bool(np.allclose(got.astype(np.float64), exact, case.rtol, case.atol * scale, equal_nan=True))


def check(
    cases: Sequence[Case],
    headers: Sequence[str],
    isa: str,
    folder: Path,
    *,
    prelude: str = "",
    flags: tuple[str, ...] = ("-O2", "-ffp-contract=off"),
) -> None:
    """Asserts that every case agrees with its expectation, writes nothing outside its results, and
    gives the same bits for each number of parts. `prelude` is C++ text that the cases use."""
    library = compile_library(_source(cases, headers, prelude), isa, folder, flags=flags)
    problems = []
    for n, case in enumerate(cases):
        run = getattr(library, f"case_{n}")
        need = getattr(library, f"scratch_{n}")
        need.restype = ctypes.c_size_t
        first: list[bytes] = []
        for parts in case.parts:
            inputs = [_Guarded(a) for a in case.inputs]
            outputs = [_Guarded(np.full(w.shape, 77, w.dtype)) for w in case.want]
            scratch = np.empty(need(parts) + 64, np.uint8)
            scratch.view()[...] = 0xFF  # NaN patterns: reading what was never written shows
            at = scratch.ctypes.data + -scratch.ctypes.data % 64
            buffers = [*inputs, *outputs]
            pointers = (ctypes.c_void_p * len(buffers))(*(b.address for b in buffers))
            for index in reversed(range(parts)):
                run(pointers, ctypes.c_void_p(at), index, parts)
            if not all(b.intact() for b in buffers):
                problems.append(f"{case.text}: wrote outside its buffers with {parts} parts")
            for g, w in zip(outputs, case.want, strict=True):
                if not _agree(g.view, w, case):
                    error = np.nanmax(np.abs(g.view.astype(np.float64) - w.astype(np.float64)))
                    problems.append(
                        f"{case.text}: {parts} parts, max error {error}, got {g.view.ravel()[:6]}, want {w.ravel()[:6]}"
                    )
            bits = [g.view.tobytes() for g in outputs]
            if first and bits != first:
                problems.append(f"{case.text}: {parts} parts give other bits than {case.parts[0]}")
            first = first or bits
    assert not problems, "\n".join(problems)
