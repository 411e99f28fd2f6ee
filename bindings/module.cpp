// skive._native: loads a compiled artefact and calls it with NumPy arrays.
//
// The call path is written against the raw CPython vectorcall protocol and NumPy's array struct
// (both reached through pybind11, so NumPy is no build dependency): a model that runs for five
// microseconds must not spend another one in argument conversion. Everything that runs once per
// artefact uses pybind11's C++ API.

#include <dlfcn.h>
#include <sys/mman.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <structmember.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "skive/cpu.h"

namespace py = pybind11;

namespace {

using py::detail::array_proxy;
using py::detail::npy_api;

// ---- The processor ------------------------------------------------------------------------------

std::vector<const char*> cpu_features() {
  std::vector<const char*> found;
  const skive::CpuState cpu;
  for (const skive::CpuFeature& f : skive::kCpuFeatures)
    if (cpu.has(f)) found.push_back(f.name);
  return found;
}

// ---- What an artefact declares ------------------------------------------------------------------

constexpr size_t kMaxRank = 32;     // fits every NumPy release
constexpr int kErrorNoMemory = -1;  // of run(); artefacts return codes > 0

// One input or output of the artefact.
struct Tensor {
  std::string label;  // "input 'x'", the start of every message
  py::str name;
  py::object dtype;  // numpy.dtype
  size_t item_bytes = 0;
  std::vector<Py_intptr_t> shape;
  bool batched = false;  // the first dimension is the batch of the call

  // Of the rows of `batch` samples; of everything if it is not batched.
  size_t bytes(int batch) const {
    size_t n = batched ? item_bytes * static_cast<size_t>(batch) : item_bytes;
    for (size_t i = batched ? 1 : 0; i < shape.size(); ++i) n *= static_cast<size_t>(shape[i]);
    return n;
  }
};

// For each early exit of the artefact the numbers of its outputs.
using Ways = std::vector<std::vector<size_t>>;

py::object numpy_dtype(const std::string& name) {
  // Only the IR's names and NumPy's long ones: NumPy reads the short form "i8" as eight bytes.
  static constexpr std::pair<const char*, const char*> kNames[] = {
      {"f32", "float32"}, {"f64", "float64"}, {"f16", "float16"}, {"i8", "int8"},
      {"i16", "int16"},   {"i32", "int32"},   {"i64", "int64"},   {"u8", "uint8"},
      {"u16", "uint16"},  {"u32", "uint32"},  {"u64", "uint64"},  {"bool", "bool"}};
  for (const auto& [ir, numpy] : kNames) {
    if (name == ir || name == numpy) return py::module_::import("numpy").attr("dtype")(numpy);
  }
  throw py::value_error("unknown dtype '" + name + "'");
}

std::vector<Tensor> parse_tensors(py::handle list, const char* role, bool allow_batch) {
  std::vector<Tensor> tensors;
  for (py::handle item : list) {
    const py::tuple row = py::reinterpret_borrow<py::object>(item);
    if (row.size() != 3) throw py::value_error("(name, shape, dtype) expected");
    Tensor t;
    t.name = py::str(row[0]);
    t.label = std::string(role) + " '" + t.name.cast<std::string>() + "'";
    for (py::handle dim : row[1]) t.shape.push_back(dim.cast<Py_intptr_t>());
    if (t.shape.size() > kMaxRank) throw py::value_error(t.label + ": more than 32 dimensions");
    t.batched = allow_batch && !t.shape.empty() && t.shape[0] == -1;
    for (size_t i = t.batched ? 1 : 0; i < t.shape.size(); ++i) {
      if (t.shape[i] < 0) throw py::value_error(t.label + ": negative dimension");
    }
    t.dtype = numpy_dtype(row[2].cast<std::string>());
    t.item_bytes = t.dtype.attr("itemsize").cast<size_t>();
    tensors.push_back(std::move(t));
  }
  return tensors;
}

// Ways that a call can end. The samples of a batch end in different ones, whose outputs are then
// joined to one array.
Ways parse_ways(py::handle list, const std::vector<Tensor>& outputs, bool batch) {
  Ways ways;
  if (outputs.empty()) throw py::value_error("ways without outputs");
  for (py::handle item : list) {
    auto& way = ways.emplace_back();
    for (py::handle number : item) {
      const size_t i = number.cast<size_t>();
      // The last output says which way was taken.
      if (i + 1 >= outputs.size()) throw py::value_error("a way has an output that is not there");
      way.push_back(i);
    }
    const auto& first = ways.front();
    bool same = way.size() == first.size();
    for (size_t k = 0; same && k < way.size(); ++k) {
      const Tensor &a = outputs[way[k]], &b = outputs[first[k]];
      same = !batch || (a.batched && a.shape == b.shape && a.dtype.equal(b.dtype));
    }
    if (!same) throw py::value_error("the ways have different outputs");
  }
  const Tensor& taken = outputs.back();
  if (!taken.dtype.equal(numpy_dtype("int32")) || taken.shape.size() != 1 ||
      (batch ? !taken.batched : taken.shape[0] != 1)) {
    throw py::value_error("the last output must say in int32 which way each sample took");
  }
  return ways;
}

// Scratch memory for the calls of one artefact. A call takes a free arena or allocates one; what it
// gives back is kept for the next call. Slots are exchanged whole, hence no lock and no ABA
// problem.
class Arenas {
 public:
  explicit Arenas(size_t bytes) : bytes_((bytes + 63) / 64 * 64) {}
  Arenas(const Arenas&) = delete;
  Arenas& operator=(const Arenas&) = delete;
  ~Arenas() {
    for (auto& slot : slots_) std::free(slot.load(std::memory_order_relaxed));
  }

  // 64-byte aligned memory, or null when there is none. An artefact without arena gets one line.
  void* take() {
    for (auto& slot : slots_) {
      if (slot.load(std::memory_order_relaxed) == nullptr) continue;
      if (void* arena = slot.exchange(nullptr, std::memory_order_acquire)) return arena;
    }
    return allocate();
  }

  void give(void* arena) {
    for (auto& slot : slots_) {
      void* empty = nullptr;
      if (slot.compare_exchange_strong(empty, arena, std::memory_order_release,
                                       std::memory_order_relaxed)) {
        return;
      }
    }
    std::free(arena);
  }

 private:
  // Large arenas ask for huge pages: the first call on 6 MB of small ones spends 3 ms in page faults.
  void* allocate() const {
    if (bytes_ < kHugePage) return std::aligned_alloc(64, bytes_ > 0 ? bytes_ : 64);
    const size_t whole_pages = (bytes_ + kHugePage - 1) / kHugePage * kHugePage;
    void* arena = std::aligned_alloc(kHugePage, whole_pages);
#ifdef MADV_HUGEPAGE
    if (arena != nullptr) madvise(arena, whole_pages, MADV_HUGEPAGE);  // advice: may be ignored
#endif
    return arena;
  }

  static constexpr size_t kHugePage = size_t{2} << 20;
  size_t bytes_;
  std::atomic<void*> slots_[8] = {};  // idle arenas kept; more concurrent calls than that allocate
};

// A name of the file that no call had before, by separators that mean nothing: dlopen gives the
// library that was loaded under a name before, even if the file is another one by now. With a
// slash in it, it is not looked up in the system's library folders.
std::string unused_name(const std::string& path) {
  static std::atomic<uint32_t> count{0};
  const size_t slash = path.rfind('/');
  const bool plain = slash == std::string::npos;
  std::string name = plain ? "./" : path.substr(0, slash + 1);
  for (uint32_t n = ++count; n != 0; n /= 2) name += n % 2 != 0 ? "./" : "/";
  return name + (plain ? path : path.substr(slash + 1));
}

// The loaded library and what the caller declared about it. Immutable after construction.
class Library {
 public:
  using Run = int (*)(const void* const*, void* const*, void*);
  using RunBatch = int (*)(const void* const*, void* const*, void*, int);

  Library(std::string path_, std::string name_, std::vector<Tensor> inputs_,
          std::vector<Tensor> outputs_, Ways ways_, size_t arena_bytes_, int batch_max_,
          int threads_)
      : path(std::move(path_)),
        name(std::move(name_)),
        inputs(std::move(inputs_)),
        outputs(std::move(outputs_)),
        ways(std::move(ways_)),
        arena_bytes(arena_bytes_),
        batch_max(batch_max_),
        threads(threads_),
        arenas(arena_bytes_) {
    handle_ = dlopen(unused_name(path).c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle_ == nullptr) raise("OSError", dlerror());
    try {
      resolve();
    } catch (...) {
      dlclose(handle_);
      throw;
    }
  }
  Library(const Library&) = delete;
  Library& operator=(const Library&) = delete;
  ~Library() {
    if (pool_stop_ != nullptr) pool_stop_();
    dlclose(handle_);
  }

  // 0, or the artefact's error code. Takes no Python object: runs without the interpreter lock.
  int run(const void* const* in, void* const* out, int batch) {
    void* arena = arenas.take();
    if (arena == nullptr) return kErrorNoMemory;
    const int code =
        run_batch_ != nullptr ? run_batch_(in, out, arena, batch) : run_(in, out, arena);
    arenas.give(arena);
    return code;
  }

  const char* error_text(int code) const {
    const char* text = error_ != nullptr ? error_(code) : nullptr;
    return text != nullptr ? text : "the artefact reported an error";
  }

  [[noreturn]] static void raise(const char* type, const std::string& message) {
    const bool builtin = std::string(type) == "OSError";
    const py::object cls = py::module_::import(builtin ? "builtins" : "skive.errors").attr(type);
    PyErr_SetString(cls.ptr(), message.c_str());
    throw py::error_already_set();
  }

  const std::string path, name;
  const std::vector<Tensor> inputs, outputs;
  const Ways ways;
  const size_t arena_bytes;
  const int batch_max, threads;
  Arenas arenas;

 private:
  template <class F>
  F symbol(const char* suffix) const {
    return reinterpret_cast<F>(dlsym(handle_, (name + suffix).c_str()));
  }

  void resolve() {
    // Asked before anything else of the library runs: its other code may use the instructions.
    const auto cpu_supported = symbol<int (*)()>("_cpu_supported");
    if (cpu_supported != nullptr && cpu_supported() == 0) {
      raise("TargetError", name +
                               ": this processor lacks instructions that the artefact was compiled "
                               "for; compile the model with target 'host' on this machine");
    }
    if (batch_max > 0) {
      run_batch_ = symbol<RunBatch>("_run_batch");
    } else {
      run_ = symbol<Run>("_run");
    }
    if (run_ == nullptr && run_batch_ == nullptr) {
      raise("OSError", path + ": no function " + name + (batch_max > 0 ? "_run_batch" : "_run"));
    }
    error_ = symbol<const char* (*)(int)>("_error");
    if (threads > 1) {
      const auto pool_start = symbol<void (*)(int)>("_pool_start");
      const auto pool_stop = symbol<void (*)()>("_pool_stop");
      if (pool_start != nullptr && pool_stop != nullptr) {
        pool_start(threads);
        pool_stop_ = pool_stop;
      }
    }
  }

  void* handle_ = nullptr;
  Run run_ = nullptr;
  RunBatch run_batch_ = nullptr;
  const char* (*error_)(int) = nullptr;
  void (*pool_stop_)() = nullptr;
};

// ---- One call -----------------------------------------------------------------------------------

// An array of n values that lives on the stack for the usual small n.
template <class T>
class Small {
 public:
  explicit Small(size_t n)
      : large_(n > kInline ? n : 0), data_(n > kInline ? large_.data() : small_) {}
  Small(const Small&) = delete;
  Small& operator=(const Small&) = delete;
  T& operator[](size_t i) { return data_[i]; }
  T* data() { return data_; }

 private:
  static constexpr size_t kInline = 8;
  T small_[kInline] = {};
  std::vector<T> large_;
  T* data_;
};

std::string shape_text(const Py_intptr_t* dims, size_t rank, bool batched) {
  std::string text = "[";
  for (size_t i = 0; i < rank; ++i) {
    text +=
        (i > 0 ? ", " : "") + (batched && i == 0 ? std::string("batch") : std::to_string(dims[i]));
  }
  return text + "]";
}

bool fail(PyObject* type, const Tensor& t, const std::string& message) {
  PyErr_SetString(type, (t.label + ": " + message).c_str());
  return false;
}

bool wrong_shape(const Tensor& t, PyObject* given) {
  const auto* array = array_proxy(given);
  return fail(PyExc_ValueError, t,
              "shape " + shape_text(array->dimensions, static_cast<size_t>(array->nd), false) +
                  " given, " + shape_text(t.shape.data(), t.shape.size(), t.batched) + " needed");
}

// Whether `given` is a NumPy array of the declared type and shape; otherwise sets a Python error.
// The first batched tensor of a call sets `batch` (0 until then), the others must agree.
bool check(const Library& lib, const Tensor& t, PyObject* given, int& batch) {
  const npy_api& numpy = npy_api::get();
  if (!numpy.PyArray_Check_(given)) {
    return fail(PyExc_TypeError, t,
                std::string("a NumPy array is needed, ") + Py_TYPE(given)->tp_name + " given");
  }
  const auto* array = array_proxy(given);
  if (array->descr != t.dtype.ptr() && !numpy.PyArray_EquivTypes_(array->descr, t.dtype.ptr())) {
    return fail(PyExc_TypeError, t,
                "dtype " + py::str(py::handle(array->descr)).cast<std::string>() + " given, " +
                    py::str(t.dtype).cast<std::string>() + " needed");
  }
  const size_t rank = t.shape.size();
  if (static_cast<size_t>(array->nd) != rank) return wrong_shape(t, given);
  for (size_t i = t.batched ? 1 : 0; i < rank; ++i) {
    if (array->dimensions[i] != t.shape[i]) return wrong_shape(t, given);
  }
  if (t.batched) {
    const Py_intptr_t size = array->dimensions[0];
    if (batch == 0) {
      if (size < 1 || size > lib.batch_max) {
        return fail(PyExc_ValueError, t,
                    "batch of " + std::to_string(size) + " given, 1 to " +
                        std::to_string(lib.batch_max) + " needed");
      }
      batch = static_cast<int>(size);
    } else if (size != batch) {
      return fail(PyExc_ValueError, t,
                  "batch of " + std::to_string(size) + " given, other arrays have " +
                      std::to_string(batch));
    }
  }
  return true;
}

constexpr int kReadable = npy_api::NPY_ARRAY_C_CONTIGUOUS_ | npy_api::NPY_ARRAY_ALIGNED_;
constexpr int kWritable = kReadable | npy_api::NPY_ARRAY_WRITEABLE_;

// Checks the inputs and fills `pointers`. `copies` keeps those arrays alive that had to be copied
// because they are strided or not aligned to their element type.
bool bind_inputs(const Library& lib, PyObject* const* given, const void** pointers,
                 Small<py::object>& copies, int& batch) {
  for (size_t i = 0; i < lib.inputs.size(); ++i) {
    const Tensor& t = lib.inputs[i];
    PyObject* array = given[i];
    if (!check(lib, t, array, batch)) return false;
    if ((array_proxy(array)->flags & kReadable) != kReadable) {
      array =
          npy_api::get().PyArray_FromAny_(array, t.dtype.inc_ref().ptr(), 0, 0, kReadable, nullptr);
      if (array == nullptr) return false;
      copies[i] = py::reinterpret_steal<py::object>(array);
    }
    pointers[i] = array_proxy(array)->data;
  }
  return true;
}

// Runs the artefact without the interpreter lock. On an error code: false and a Python error.
bool execute(Library& lib, const void* const* inputs, void* const* outputs, int batch) {
  PyThreadState* state = PyEval_SaveThread();
  const int code = lib.run(inputs, outputs, batch);
  PyEval_RestoreThread(state);
  if (code == 0) return true;
  if (code == kErrorNoMemory) {
    PyErr_Format(PyExc_MemoryError, "%s: no memory for an arena of %zu bytes", lib.name.c_str(),
                 lib.arena_bytes);
    return false;
  }
  Library::raise("SkiveError",
                 lib.name + ": " + lib.error_text(code) + " (code " + std::to_string(code) + ")");
}

py::object new_output(const Tensor& t, int batch) {
  Py_intptr_t dims[kMaxRank];
  for (size_t i = 0; i < t.shape.size(); ++i) dims[i] = t.shape[i];
  if (t.batched) dims[0] = batch;
  const npy_api& numpy = npy_api::get();
  PyObject* array = numpy.PyArray_NewFromDescr_(numpy.PyArray_Type_, t.dtype.inc_ref().ptr(),
                                                static_cast<int>(t.shape.size()), dims, nullptr,
                                                nullptr, 0, nullptr);
  if (array == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(array);
}

// Puts positional and keyword arguments into the order of the inputs; `ordered` holds borrowed
// references, one per input.
bool order_arguments(const Library& lib, PyObject* const* args, size_t positional,
                     PyObject* keywords, PyObject** ordered) {
  const size_t count = lib.inputs.size();
  const size_t named = keywords != nullptr ? static_cast<size_t>(PyTuple_GET_SIZE(keywords)) : 0;
  if (positional + named > count) {
    PyErr_Format(PyExc_TypeError, "%s: %zu inputs given, %zu needed", lib.name.c_str(),
                 positional + named, count);
    return false;
  }
  for (size_t i = 0; i < positional; ++i) ordered[i] = args[i];
  for (size_t k = 0; k < named; ++k) {
    PyObject* key = PyTuple_GET_ITEM(keywords, static_cast<Py_ssize_t>(k));
    size_t i = 0;
    while (i < count && PyUnicode_Compare(key, lib.inputs[i].name.ptr()) != 0) ++i;
    if (i == count) {
      PyErr_Format(PyExc_TypeError, "%s: no input is named %R", lib.name.c_str(), key);
      return false;
    }
    if (ordered[i] != nullptr) return fail(PyExc_TypeError, lib.inputs[i], "given twice");
    ordered[i] = args[positional + k];
  }
  for (size_t i = 0; i < count; ++i) {
    if (ordered[i] == nullptr) return fail(PyExc_TypeError, lib.inputs[i], "not given");
  }
  return true;
}

// The batch of a call whose inputs `pointers` lead to; throws if the arguments do not fit.
int bind_arguments(const Library& lib, PyObject* const* args, size_t positional,
                   PyObject* keywords, const void** pointers, Small<py::object>& copies) {
  Small<PyObject*> ordered(lib.inputs.size());
  int batch = 0;
  if (!order_arguments(lib, args, positional, keywords, ordered.data()) ||
      !bind_inputs(lib, ordered.data(), pointers, copies, batch)) {
    throw py::error_already_set();
  }
  return batch;
}

// The array itself for one output, otherwise a tuple.
py::object packed(Small<py::object>& arrays, size_t count) {
  if (count == 1) return std::move(arrays[0]);
  py::tuple result(count);
  for (size_t i = 0; i < count; ++i) result[i] = std::move(arrays[i]);
  return std::move(result);
}

// The output arrays of one call.
py::object call(Library& lib, PyObject* const* args, size_t positional, PyObject* keywords) {
  Small<const void*> in(lib.inputs.size());
  Small<py::object> copies(lib.inputs.size());
  const int batch = bind_arguments(lib, args, positional, keywords, in.data(), copies);

  const size_t count = lib.outputs.size();
  Small<py::object> arrays(count);
  Small<void*> out(count);
  for (size_t i = 0; i < count; ++i) {
    arrays[i] = new_output(lib.outputs[i], batch);
    out[i] = array_proxy(arrays[i].ptr())->data;
  }
  if (!execute(lib, in.data(), out.data(), batch)) throw py::error_already_set();
  return packed(arrays, count);
}

// The outputs of the exit that each sample took. A network has several exits and most outputs are
// a few numbers: an array (60 ns) is made of what is returned, the rest is written to the stack. The
// last input, the thresholds, comes first: a functools.partial holds it.
py::object call_taken(Library& lib, PyObject* const* args, size_t positional) {
  if (lib.ways.empty()) throw py::type_error(lib.name + ": has no ways to take");
  Small<PyObject*> given(positional);
  if (positional > 0) {
    std::copy(args + 1, args + positional, given.data());
    given[positional - 1] = args[0];
  }
  Small<const void*> in(lib.inputs.size());
  Small<py::object> copies(lib.inputs.size());
  const int batch = bind_arguments(lib, given.data(), positional, nullptr, in.data(), copies);

  const size_t count = lib.outputs.size();
  alignas(64) unsigned char stack[4096];
  size_t used = 0;
  Small<py::object> arrays(count);
  Small<void*> out(count);
  for (size_t i = 0; i < count; ++i) {
    const size_t bytes = (lib.outputs[i].bytes(batch) + 63) / 64 * 64;
    if (bytes <= sizeof stack - used) {
      out[i] = stack + used;
      used += bytes;
    } else {
      arrays[i] = new_output(lib.outputs[i], batch);
      out[i] = array_proxy(arrays[i].ptr())->data;
    }
  }
  if (!execute(lib, in.data(), out.data(), batch)) throw py::error_already_set();

  const auto* exits = static_cast<const int32_t*>(out[count - 1]);
  const int samples = lib.batch_max > 0 ? batch : 1;
  bool same = true;
  for (int s = 0; s < samples; ++s) {
    if (exits[s] < 0 || static_cast<size_t>(exits[s]) >= lib.ways.size()) {
      throw std::runtime_error(lib.name + ": an exit was taken that is not there");
    }
    same = same && exits[s] == exits[0];
  }
  const auto& way = lib.ways[static_cast<size_t>(exits[0])];
  Small<py::object> results(way.size());
  for (size_t k = 0; k < way.size(); ++k) {
    const Tensor& t = lib.outputs[way[k]];
    if (same && arrays[way[k]]) {
      results[k] = arrays[way[k]];
      continue;
    }
    results[k] = new_output(t, batch);
    auto* to = static_cast<unsigned char*>(
        static_cast<void*>(array_proxy(results[k].ptr())->data));
    if (same) {
      std::memcpy(to, out[way[k]], t.bytes(batch));
      continue;
    }
    const size_t row = t.bytes(1);
    for (int s = 0; s < samples; ++s) {
      const void* from = out[lib.ways[static_cast<size_t>(exits[s])][k]];
      const size_t offset = static_cast<size_t>(s) * row;
      std::memcpy(to + offset, static_cast<const unsigned char*>(from) + offset, row);
    }
  }
  return packed(results, way.size());
}

// Whether two checked, contiguous arrays share memory; `a_item` and `b_item` are bytes per element.
bool overlap(PyObject* a, size_t a_item, PyObject* b, size_t b_item) {
  const auto range = [](PyObject* object, size_t bytes) {
    const auto* array = array_proxy(object);
    for (int i = 0; i < array->nd; ++i) bytes *= static_cast<size_t>(array->dimensions[i]);
    const auto begin = reinterpret_cast<std::uintptr_t>(array->data);
    return std::pair(begin, begin + bytes);
  };
  const auto [a_begin, a_end] = range(a, a_item);
  const auto [b_begin, b_end] = range(b, b_item);
  return a_begin < b_end && b_begin < a_end;
}

// Writes the results into `outputs`. They are never copied, and may not overlap one another or an
// input: the kernels read and write in an order of their own.
void call_into(Library& lib, const py::tuple& inputs, const py::tuple& outputs) {
  const auto expect = [&lib](size_t given, size_t needed, const char* what) {
    if (given == needed) return;
    throw py::type_error(lib.name + ": " + std::to_string(given) + " " + what + " given, " +
                         std::to_string(needed) + " needed");
  };
  expect(inputs.size(), lib.inputs.size(), "inputs");
  expect(outputs.size(), lib.outputs.size(), "outputs");
  Small<PyObject*> given(inputs.size());
  for (size_t i = 0; i < inputs.size(); ++i) given[i] = py::object(inputs[i]).ptr();
  Small<const void*> in(inputs.size());
  Small<py::object> copies(inputs.size());
  int batch = 0;
  if (!bind_inputs(lib, given.data(), in.data(), copies, batch)) throw py::error_already_set();

  Small<void*> out(outputs.size());
  for (size_t i = 0; i < outputs.size(); ++i) {
    const Tensor& t = lib.outputs[i];
    PyObject* array = py::object(outputs[i]).ptr();
    if (!check(lib, t, array, batch)) throw py::error_already_set();
    if ((array_proxy(array)->flags & kWritable) != kWritable) {
      throw py::value_error(t.label + ": must be writable, C-contiguous and aligned");
    }
    for (size_t j = 0; j < inputs.size(); ++j) {
      PyObject* read = copies[j] ? copies[j].ptr() : given[j];
      if (overlap(array, t.item_bytes, read, lib.inputs[j].item_bytes)) {
        throw py::value_error(t.label + ": shares memory with " + lib.inputs[j].label);
      }
    }
    for (size_t j = 0; j < i; ++j) {
      PyObject* other = py::object(outputs[j]).ptr();
      if (overlap(array, t.item_bytes, other, lib.outputs[j].item_bytes)) {
        throw py::value_error(t.label + ": shares memory with " + lib.outputs[j].label);
      }
    }
    out[i] = array_proxy(array)->data;
  }
  if (!execute(lib, in.data(), out.data(), batch)) throw py::error_already_set();
}

// ---- The Python type ----------------------------------------------------------------------------

struct ArtifactObject {
  PyObject_HEAD vectorcallfunc vectorcall;
  Library* library;
};

Library& library_of(PyObject* self) { return *reinterpret_cast<ArtifactObject*>(self)->library; }

// Runs `body` and turns a C++ exception into a Python error and a null result.
template <class F>
PyObject* guarded(const F& body) {
  try {
    return body();
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

PyObject* artifact_vectorcall(PyObject* self, PyObject* const* args, size_t flagged,
                              PyObject* keywords) {
  return guarded([&] {
    const auto positional = static_cast<size_t>(PyVectorcall_NARGS(flagged));
    return call(library_of(self), args, positional, keywords).release().ptr();
  });
}

PyObject* artifact_taken(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  return guarded([&] {
    return call_taken(library_of(self), args, static_cast<size_t>(count)).release().ptr();
  });
}

PyObject* artifact_call_into(PyObject* self, PyObject* args) {
  return guarded([&]() -> PyObject* {
    PyObject *inputs = nullptr, *outputs = nullptr;
    if (!PyArg_ParseTuple(args, "OO:call_into", &inputs, &outputs)) return nullptr;
    // Tuples of our own: the caller may change a list from another thread while the artefact runs.
    call_into(library_of(self), py::tuple(py::reinterpret_borrow<py::object>(inputs)),
              py::tuple(py::reinterpret_borrow<py::object>(outputs)));
    Py_RETURN_NONE;
  });
}

PyObject* artifact_new(PyTypeObject* type, PyObject* args, PyObject* keywords) {
  static const char* const kNames[] = {"path",      "name",    "inputs", "outputs", "arena_bytes",
                                       "batch_max", "threads", "needs",  "ways",    nullptr};
  return guarded([&]() -> PyObject* {
    PyObject *path = nullptr, *inputs = nullptr, *outputs = nullptr;
    PyObject *needs = nullptr, *ways = nullptr;
    const char* name = nullptr;
    Py_ssize_t arena_bytes = 0;
    int batch_max = 0, threads = 1;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "O&sOOn|ii$OO:Artifact",
                                     const_cast<char**>(kNames), PyUnicode_FSConverter, &path,
                                     &name, &inputs, &outputs, &arena_bytes, &batch_max, &threads,
                                     &needs, &ways)) {
      return nullptr;
    }
    const std::string file = py::reinterpret_steal<py::bytes>(path);
    if (arena_bytes < 0 || batch_max < 0 || threads < 1) {
      throw py::value_error("arena_bytes and batch_max must be >= 0, threads >= 1");
    }
    if (needs != nullptr) {
      std::string missing;
      const std::vector<const char*> present = cpu_features();
      for (py::handle need : py::handle(needs)) {
        const std::string feature = need.cast<std::string>();
        bool found = false;
        for (const char* have : present) found = found || feature == have;
        if (!found) missing += (missing.empty() ? "" : ", ") + feature;
      }
      if (!missing.empty()) {
        Library::raise("TargetError", std::string(name) + ": the artefact needs " + missing +
                                          ", which this processor does not have; compile the model "
                                          "with target 'host' on this machine");
      }
    }
    auto parsed_inputs = parse_tensors(inputs, "input", batch_max > 0);
    auto parsed_outputs = parse_tensors(outputs, "output", batch_max > 0);
    Ways parsed_ways;
    if (ways != nullptr) parsed_ways = parse_ways(ways, parsed_outputs, batch_max > 0);
    bool batched = false;
    for (const Tensor& t : parsed_inputs) batched = batched || t.batched;
    if (batch_max > 0 && !batched) {
      throw py::value_error("batch_max needs an input whose first dimension is -1");
    }
    PyObject* self = type->tp_alloc(type, 0);
    if (self == nullptr) return nullptr;
    const py::object owner = py::reinterpret_steal<py::object>(self);
    auto* artifact = reinterpret_cast<ArtifactObject*>(self);
    artifact->vectorcall = artifact_vectorcall;
    artifact->library = new Library(file, name, std::move(parsed_inputs), std::move(parsed_outputs),
                                    std::move(parsed_ways), static_cast<size_t>(arena_bytes),
                                    batch_max, threads);
    return py::object(owner).release().ptr();
  });
}

void artifact_dealloc(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  delete reinterpret_cast<ArtifactObject*>(self)->library;  // null when the constructor failed
  type->tp_free(self);
  Py_DECREF(type);
}

PyObject* artifact_repr(PyObject* self) {
  return guarded([&] {
    const Library& lib = library_of(self);
    return PyUnicode_FromFormat("<Artifact %s: %zu inputs, %zu outputs, arena %zu bytes>",
                                lib.name.c_str(), lib.inputs.size(), lib.outputs.size(),
                                lib.arena_bytes);
  });
}

PyObject* describe(const std::vector<Tensor>& tensors) {
  py::list rows;
  for (const Tensor& t : tensors) {
    py::tuple shape(t.shape.size());
    for (size_t i = 0; i < t.shape.size(); ++i) shape[i] = t.shape[i];
    rows.append(py::make_tuple(t.name, shape, t.dtype.attr("name")));
  }
  return rows.release().ptr();
}

PyObject* artifact_inputs(PyObject* self, void*) {
  return guarded([&] { return describe(library_of(self).inputs); });
}
PyObject* artifact_outputs(PyObject* self, void*) {
  return guarded([&] { return describe(library_of(self).outputs); });
}
PyObject* artifact_path(PyObject* self, void*) {
  return PyUnicode_DecodeFSDefault(library_of(self).path.c_str());
}
PyObject* artifact_name(PyObject* self, void*) {
  return PyUnicode_FromString(library_of(self).name.c_str());
}
PyObject* artifact_arena_bytes(PyObject* self, void*) {
  return PyLong_FromSize_t(library_of(self).arena_bytes);
}
PyObject* artifact_batch_max(PyObject* self, void*) {
  return PyLong_FromLong(library_of(self).batch_max);
}
PyObject* artifact_threads(PyObject* self, void*) {
  return PyLong_FromLong(library_of(self).threads);
}

void add_artifact_type(py::module_& m) {
  static PyMemberDef members[] = {
      {"__vectorcalloffset__", T_PYSSIZET, offsetof(ArtifactObject, vectorcall), READONLY, nullptr},
      {nullptr, 0, 0, 0, nullptr}};
  static PyMethodDef methods[] = {
      {"call_into", artifact_call_into, METH_VARARGS,
       "call_into(inputs, outputs): runs the artefact and writes its results into `outputs`."},
      {"taken", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(artifact_taken)),
       METH_FASTCALL,
       "taken(last, *inputs): the outputs of the way that each sample took; the last input first."},
      {nullptr, nullptr, 0, nullptr}};
  static PyGetSetDef properties[] = {
      {"path", artifact_path, nullptr, "The shared library.", nullptr},
      {"name", artifact_name, nullptr, "The prefix of its C functions.", nullptr},
      {"inputs", artifact_inputs, nullptr, "(name, shape, dtype) of each input.", nullptr},
      {"outputs", artifact_outputs, nullptr, "(name, shape, dtype) of each output.", nullptr},
      {"arena_bytes", artifact_arena_bytes, nullptr, "Scratch bytes of one call.", nullptr},
      {"batch_max", artifact_batch_max, nullptr, "Largest batch, 0 if the shapes are fixed.",
       nullptr},
      {"threads", artifact_threads, nullptr, "Threads that share one call.", nullptr},
      {nullptr, nullptr, nullptr, nullptr, nullptr}};
  static char doc[] =
      "A loaded artefact. Call it with one NumPy array per input; it returns the output array, or "
      "a "
      "tuple for several outputs.";
  static PyType_Slot slots[] = {{Py_tp_new, reinterpret_cast<void*>(artifact_new)},
                                {Py_tp_dealloc, reinterpret_cast<void*>(artifact_dealloc)},
                                {Py_tp_repr, reinterpret_cast<void*>(artifact_repr)},
                                {Py_tp_call, reinterpret_cast<void*>(PyVectorcall_Call)},
                                {Py_tp_members, members},
                                {Py_tp_methods, methods},
                                {Py_tp_getset, properties},
                                {Py_tp_doc, doc},
                                {0, nullptr}};
  static PyType_Spec spec = {
      "skive._native.Artifact", sizeof(ArtifactObject), 0,
      Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL | Py_TPFLAGS_IMMUTABLETYPE, slots};
  PyObject* type = PyType_FromSpec(&spec);
  if (type == nullptr) throw py::error_already_set();
  m.attr("Artifact") = py::reinterpret_steal<py::object>(type);
}

}  // namespace

PYBIND11_MODULE(_native, m, py::mod_gil_not_used()) {
  m.doc() = "Loads compiled artefacts and calls them with NumPy arrays.";
  m.def(
      "cpu_features",
      [] {
        py::list names;
        for (const char* name : cpu_features()) names.append(name);
        return names;
      },
      "The instruction-set extensions of this processor, in the spelling of the compilers' -m "
      "flags.");
  add_artifact_type(m);
}
