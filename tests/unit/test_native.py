"""The native loader, against artefacts written by hand."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
import timeit
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from skive._native import Artifact, cpu_features
from skive.errors import SkiveError, TargetError

SOURCE = r"""
#include <stdint.h>
#include <string.h>
#include <unistd.h>
#define API extern "C" __attribute__((visibility("default")))

API int scale_run(const void* const* in, void* const* out, void*) {
  for (int i = 0; i < 6; ++i) ((float*)out[0])[i] = 2 * ((const float*)in[0])[i];
  return 0;
}
// sum = a + b, difference = a - b
API int pair_run(const void* const* in, void* const* out, void*) {
  for (int i = 0; i < 3; ++i) {
    ((int32_t*)out[0])[i] = ((const int32_t*)in[0])[i] + ((const int8_t*)in[1])[i];
    ((int32_t*)out[1])[i] = ((const int32_t*)in[0])[i] - ((const int8_t*)in[1])[i];
  }
  return 0;
}
API int negate_run_batch(const void* const* in, void* const* out, void*, int batch) {
  for (int i = 0; i < 2 * batch; ++i) ((float*)out[0])[i] = -((const float*)in[0])[i];
  return 0;
}
// The largest number of calls that were inside at once; the result passes through the arena.
static int inside = 0;
API int slow_run(const void* const* in, void* const* out, void* arena) {
  if ((uintptr_t)arena % 64 != 0) return 2;
  const int now = __atomic_add_fetch(&inside, 1, __ATOMIC_SEQ_CST);
  memcpy(arena, in[0], 4);
  usleep(20000);
  memcpy(out[0], arena, 4);
  ((int32_t*)out[1])[0] = now;
  __atomic_sub_fetch(&inside, 1, __ATOMIC_SEQ_CST);
  return 0;
}
API int broken_run(const void* const*, void* const*, void*) { return 7; }
API const char* broken_error(int code) { return code == 7 ? "gather/idx: index out of range" : 0; }
API int future_run(const void* const*, void* const*, void*) { __builtin_trap(); }
API int future_cpu_supported(void) { return 0; }

static int pool_threads = 0;
API void pooled_pool_start(int n) { pool_threads += n; }
API void pooled_pool_stop(void) { pool_threads = -1; }
API int pooled_run(const void* const*, void* const* out, void*) {
  *(int32_t*)out[0] = pool_threads;
  return 0;
}
API int many_run(const void* const* in, void* const* out, void*) {
  float sum = 0;
  for (int i = 0; i < 20; ++i) sum += ((const float*)in[i])[0];
  for (int i = 0; i < 12; ++i) ((float*)out[i])[0] = sum + i;
  return 0;
}
// Sample s leaves by the way that its first number says; output o has s + 100 o in its 1,000 numbers (o odd) or 3.
API int leave_run_batch(const void* const* in, void* const* out, void*, int batch) {
  for (int s = 0; s < batch; ++s) {
    for (int o = 0; o < 6; ++o) {
      const int n = o % 2 ? 1000 : 3;
      for (int i = 0; i < n; ++i) ((float*)out[o])[s * n + i] = s + 100 * o;
    }
    ((int32_t*)out[6])[s] = (int)((const float*)in[0])[2 * s];
  }
  return 0;
}
API int leave_run(const void* const* in, void* const* out, void* arena) { return leave_run_batch(in, out, arena, 1); }
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("native")
    source = folder / "artefacts.cpp"
    source.write_text(SOURCE)
    path = folder / "libartefacts.so"
    subprocess.run(["c++", "-O1", "-shared", "-fPIC", str(source), "-o", str(path)], check=True)
    return path


@pytest.fixture
def scale(library: Path) -> Artifact:
    return Artifact(library, "scale", [("x", (2, 3), "f32")], [("y", (2, 3), "f32")], 0)


@pytest.fixture
def pair(library: Path) -> Artifact:
    return Artifact(library, "pair", [("a", (3,), "i32"), ("b", (3,), "i8")],
                    [("sum", (3,), "i32"), ("difference", (3,), "int32")], 64)


X = np.arange(6, dtype=np.float32).reshape(2, 3)


def test_one_output_is_an_array_and_several_are_a_tuple(scale: Artifact, pair: Artifact) -> None:
    y = scale(X)
    assert isinstance(y, np.ndarray) and y.dtype == np.float32
    np.testing.assert_array_equal(y, 2 * X)
    a, b = np.array([1, 2, 3], np.int32), np.array([1, -1, 5], np.int8)
    total, difference = pair(a, b)
    np.testing.assert_array_equal(total, a + b)
    np.testing.assert_array_equal(difference, a - b)


def test_inputs_go_by_position_or_name(pair: Artifact) -> None:
    a, b = np.array([1, 2, 3], np.int32), np.array([1, -1, 5], np.int8)
    for result in [pair(a, b=b), pair(b=b, a=a)]:
        np.testing.assert_array_equal(result[0], a + b)


def test_describes_itself(library: Path, pair: Artifact) -> None:
    assert pair.inputs == [("a", (3,), "int32"), ("b", (3,), "int8")]
    assert [row[0] for row in pair.outputs] == ["sum", "difference"]
    assert (pair.path, pair.name, pair.arena_bytes) == (str(library), "pair", 64)
    assert (pair.batch_max, pair.threads) == (0, 1)
    assert repr(pair) == "<Artifact pair: 2 inputs, 2 outputs, arena 64 bytes>"


def test_strided_and_misaligned_inputs_are_copied(scale: Artifact) -> None:
    transposed = np.ascontiguousarray(X.T).T
    assert not transposed.flags.c_contiguous
    misaligned = np.frombuffer(b"\0" + X.tobytes(), np.uint8)[1:].view(np.float32).reshape(2, 3)
    assert not misaligned.flags.aligned
    read_only = X.copy()
    read_only.flags.writeable = False
    for x in [transposed, misaligned, np.stack([X, X], axis=-1)[..., 0], X[::-1][::-1], read_only]:
        np.testing.assert_array_equal(scale(x), 2 * X)


def test_copies_and_results_are_released(scale: Artifact) -> None:
    x = np.ascontiguousarray(X.T).T
    before = sys.getrefcount(np.dtype(np.float32)), sys.getrefcount(x)
    for _ in range(100):
        scale(x)
        with pytest.raises(ValueError):
            scale(X[:1])
    after = sys.getrefcount(np.dtype(np.float32)), sys.getrefcount(x)
    assert abs(after[0] - before[0]) < 10 and after[1] == before[1]


@pytest.mark.parametrize("args, kwargs, error, message", [
    ((X[0],), {}, ValueError, "input 'x': shape [3] given, [2, 3] needed"),
    ((X.T,), {}, ValueError, "input 'x': shape [3, 2] given, [2, 3] needed"),
    ((X.astype(np.float64),), {}, TypeError, "input 'x': dtype float64 given, float32 needed"),
    ((X.astype(">f4"),), {}, TypeError, "input 'x': dtype >f4 given, float32 needed"),
    (([1, 2],), {}, TypeError, "input 'x': a NumPy array is needed, list given"),
    ((), {}, TypeError, "input 'x': not given"),
    ((X, X), {}, TypeError, "scale: 2 inputs given, 1 needed"),
    ((), {"z": X}, TypeError, "scale: no input is named 'z'"),
])
def test_wrong_arguments_are_named(scale: Artifact, args: tuple, kwargs: dict, error: type[Exception],
                                   message: str) -> None:
    with pytest.raises(error) as caught:
        scale(*args, **kwargs)
    assert str(caught.value) == message


def test_an_input_cannot_be_given_twice(pair: Artifact) -> None:
    with pytest.raises(TypeError, match="input 'a': given twice"):
        pair(np.zeros(3, np.int32), a=np.zeros(3, np.int32))


def test_call_into_writes_where_it_is_told(scale: Artifact) -> None:
    y = np.empty_like(X)
    assert scale.call_into([X], [y]) is None
    np.testing.assert_array_equal(y, 2 * X)


def test_call_into_refuses_outputs_it_cannot_write(scale: Artifact, pair: Artifact) -> None:
    read_only = np.empty_like(X)
    read_only.flags.writeable = False
    for y in [read_only, np.empty((3, 2), np.float32).T]:
        with pytest.raises(ValueError, match="output 'y': must be writable, C-contiguous and aligned"):
            scale.call_into([X], [y])
    with pytest.raises(TypeError, match="output 'y': dtype float64 given"):
        scale.call_into([X], [np.empty((2, 3))])
    with pytest.raises(TypeError, match="0 outputs given, 1 needed"):
        scale.call_into([X], [])
    memory = np.zeros(9, np.float32)
    with pytest.raises(ValueError, match="output 'y': shares memory with input 'x'"):
        scale.call_into([memory[:6].reshape(2, 3)], [memory[3:].reshape(2, 3)])
    out = np.zeros(3, np.int32)
    with pytest.raises(ValueError, match="output 'difference': shares memory with output 'sum'"):
        pair.call_into([np.zeros(3, np.int32), np.zeros(3, np.int8)], [out, out])


def test_batch(library: Path) -> None:
    negate = Artifact(library, "negate", [("x", (-1, 2), "f32")], [("y", (-1, 2), "f32")], 64, 4)
    for batch in [1, 3, 4]:
        x = np.arange(2 * batch, dtype=np.float32).reshape(batch, 2)
        y = negate(x)
        assert y.shape == (batch, 2)
        np.testing.assert_array_equal(y, -x)
    for batch in [0, 5]:
        with pytest.raises(ValueError, match=f"input 'x': batch of {batch} given, 1 to 4 needed"):
            negate(np.zeros((batch, 2), np.float32))
    with pytest.raises(ValueError, match=r"shape \[1, 3\] given, \[batch, 2\] needed"):
        negate(np.zeros((1, 3), np.float32))
    with pytest.raises(ValueError, match="output 'y': batch of 3 given, other arrays have 2"):
        negate.call_into([np.zeros((2, 2), np.float32)], [np.zeros((3, 2), np.float32)])


def test_more_tensors_than_the_stack_arrays_hold(library: Path) -> None:
    many = Artifact(library, "many", [(f"x{i}", (1,), "f32") for i in range(20)],
                    [(f"y{i}", (), "f32") for i in range(12)], 0)
    outputs = many(*[np.array([i], np.float32) for i in range(20)])
    assert [float(y) for y in outputs] == [190.0 + i for i in range(12)]
    assert all(y.shape == () for y in outputs)


def leaving(library: Path, batch_max: int, ways: Sequence[Sequence[int]], taken: str = "i32") -> Artifact:
    """Six outputs, of 3 and of 1,000 numbers in turn."""
    outputs = [(f"y{o}", (-1 if batch_max else 1, 1000 if o % 2 else 3), "f32") for o in range(6)]
    return Artifact(library, "leave", [("x", (-1 if batch_max else 1, 2), "f32")],
                    [*outputs, ("taken", (-1 if batch_max else 1,), taken)], 64, batch_max, ways=ways)


@pytest.mark.parametrize("batch_max", [0, 4])
def test_the_outputs_of_the_way_that_was_taken(library: Path, batch_max: int) -> None:
    leave = leaving(library, batch_max, [(0, 1), (2, 5), (4, 3)])
    for way, (small, large) in enumerate([(0, 1), (2, 5), (4, 3)]):
        a, b = leave.taken(np.array([[way, 0]], np.float32))
        np.testing.assert_array_equal(a, np.full((1, 3), 100 * small, np.float32))
        np.testing.assert_array_equal(b, np.full((1, 1000), 100 * large, np.float32))
    one = leaving(library, batch_max, [(4,), (0,)]).taken(np.array([[1, 0]], np.float32))
    assert isinstance(one, np.ndarray) and one.tolist() == [[0, 0, 0]]
    with pytest.raises(RuntimeError, match="an exit was taken that is not there"):
        leave.taken(np.array([[3, 0]], np.float32))
    with pytest.raises(TypeError, match="input 'x': not given"):
        leave.taken()


def test_the_last_input_comes_first_where_ways_are_taken(library: Path) -> None:
    """Thresholds are the last: a functools.partial holds them."""
    leave = Artifact(library, "leave", [("x", (1, 2), "f32"), ("limits", (3,), "f32")],
                     [*((f"y{o}", (1, 1000 if o % 2 else 3), "f32") for o in range(6)), ("taken", (1,), "i32")], 64, 0,
                     ways=[(0,), (2,)])
    x, limits = np.array([[1, 7]], np.float32), np.zeros(3, np.float32)
    assert leave.taken(limits, x).tolist() == [[200, 200, 200]]
    with pytest.raises(ValueError, match="input 'x'"):
        leave.taken(x, limits)


def test_samples_of_a_batch_take_different_ways(library: Path) -> None:
    ways = [(0, 1), (4, 3), (2, 5), (0, 3)]  # outputs may be those of several ways
    leave = leaving(library, 4, ways)
    for taken in [(2, 0, 1, 3), (0, 3, 0, 3), (1, 1, 1, 1), (3, 2), (0,)]:
        a, b = leave.taken(np.stack([np.float32(taken), np.zeros(len(taken), np.float32)], 1))
        assert (a.shape, b.shape) == ((len(taken), 3), (len(taken), 1000))
        for s, way in enumerate(taken):
            assert (a[s] == s + 100 * ways[way][0]).all() and (b[s] == s + 100 * ways[way][1]).all()


def test_wrong_ways_are_refused(library: Path, scale: Artifact) -> None:
    for ways in [[(6,)], [(9,)], [(-1,)], [(0,), (1,)], [(0,), (0, 2)]]:
        with pytest.raises((ValueError, RuntimeError)):
            leaving(library, 4, ways)
    with pytest.raises(ValueError, match="int32"):
        leaving(library, 4, [(0,)], taken="f32")
    leaving(library, 0, [(0,), (1,)])  # a single sample may get outputs of different shapes
    with pytest.raises(TypeError, match="has no ways to take"):
        scale.taken(X)


def test_calls_from_several_threads_run_at_once_in_their_own_arenas(library: Path) -> None:
    slow = Artifact(library, "slow", [("x", (), "i32")], [("y", (), "i32"), ("n", (), "i32")], 4)
    results: dict[int, tuple[np.ndarray, ...]] = {}

    def call(i: int) -> None:
        results[i] = slow(np.array(i, np.int32))

    for _ in range(2):  # with new arenas, then with kept ones
        threads = [threading.Thread(target=call, args=(i,)) for i in range(12)]
        begin = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert time.perf_counter() - begin < 12 * 0.020, "the interpreter lock was held"
        assert {i: int(y) for i, (y, _) in results.items()} == {i: i for i in range(12)}
        assert max(int(n) for _, n in results.values()) > 1


def test_an_error_code_becomes_an_exception(library: Path) -> None:
    broken = Artifact(library, "broken", [], [], 0)
    with pytest.raises(SkiveError, match=r"broken: gather/idx: index out of range \(code 7\)"):
        broken()


def test_a_processor_that_lacks_instructions_is_refused(library: Path) -> None:
    with pytest.raises(TargetError, match="future: this processor lacks instructions"):
        Artifact(library, "future", [], [], 0)
    with pytest.raises(TargetError, match="needs avx1024f, which this processor does not have"):
        Artifact("/nonexistent.so", "scale", [], [], 0, needs=["avx1024f"])
    Artifact(library, "scale", [], [], 0, needs=cpu_features())


def test_libraries_that_cannot_be_loaded(library: Path, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no function nothing_run"):
        Artifact(library, "nothing", [], [], 0)
    with pytest.raises(OSError, match="no function scale_run_batch"):
        Artifact(library, "scale", [("x", (-1,), "f32")], [], 0, 2)
    (tmp_path / "bad.so").write_bytes(b"\x7fELF not")
    for path in [tmp_path / "bad.so", tmp_path / "none.so"]:
        with pytest.raises(OSError, match=path.name):
            Artifact(path, "scale", [], [], 0)


@pytest.mark.parametrize("arguments", [
    dict(inputs=[("x", (2, -3), "f32")]), dict(inputs=[("x", (-1,), "f32")]),
    dict(inputs=[("x", (1,), "q7")]), dict(inputs=[("x", (1,))]), dict(inputs=[("x", (1,) * 33, "f32")]),
    dict(arena_bytes=-1), dict(threads=0), dict(batch_max=2)])
def test_wrong_declarations_are_refused(library: Path, arguments: dict) -> None:
    with pytest.raises(ValueError):
        Artifact(library, "scale", **dict(inputs=[("x", (6,), "f32")], outputs=[], arena_bytes=0) | arguments)


def test_the_pool_runs_while_the_artefact_is_loaded(library: Path) -> None:
    declared = dict(inputs=[], outputs=[("n", (), "i32")], arena_bytes=0)
    one = Artifact(library, "pooled", **declared)
    assert int(one()) == 0  # one thread needs no pool
    two = Artifact(library, "pooled", threads=2, **declared)
    assert int(two()) == 2
    del two
    gc.collect()
    assert int(one()) == -1


def test_no_short_dtype_of_numpy_is_mistaken(library: Path) -> None:
    artifact = Artifact(library, "pooled", [], [("n", (), "i32")], 0)
    assert artifact.outputs == [("n", (), "int32")]
    bytes_wide = Artifact(library, "pooled", [("x", (1,), "i8")], [("n", (), "i32")], 0)
    assert bytes_wide.inputs == [("x", (1,), "int8")]


def test_a_call_costs_less_than_a_microsecond(scale: Artifact) -> None:
    seconds = min(timeit.repeat(lambda: scale(X), number=1000, repeat=200)) / 1000
    assert seconds < 1e-6, f"{1e9 * seconds:.0f} ns"


def test_cpu_features_agree_with_the_kernel() -> None:
    cpuinfo = Path("/proc/cpuinfo")
    flags = next((line.split() for line in cpuinfo.read_text().splitlines() if line.startswith("flags")),
                 None) if cpuinfo.exists() else None
    if flags is None:
        pytest.skip("no x86 flags in /proc/cpuinfo")
    known = {flag.replace("sse4_", "sse4.").replace("_", "") for flag in flags}
    asked = {"sse2", "ssse3", "sse4.1", "sse4.2", "avx", "f16c", "fma", "avx2", "bmi2", "avx512f", "avx512bw",
             "avx512vl", "avx512dq", "avx512vnni", "avx512bf16", "avx512fp16", "avxvnni"}
    assert set(cpu_features()) & asked == known & asked
