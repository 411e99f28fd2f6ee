// What the processor can do, asked at run time: the instructions that it has and whose registers the
// operating system saves. (__builtin_cpu_supports needs a run-time library that not every clang has.)
#ifndef SKIVE_CPU_H
#define SKIVE_CPU_H

#include "skive/isa.h"

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
// Runs before anything is known: no vector registers, whatever the flags of the file allow.
#define SKIVE_ANY_CPU __attribute__((noinline, target("general-regs-only")))
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif
#ifndef SKIVE_ANY_CPU
#define SKIVE_ANY_CPU
#endif

namespace skive {
inline namespace SKIVE_ISA {

#if defined(__x86_64__) || defined(__i386__)

enum CpuWord { kLeaf1C, kLeaf1D, kLeaf7B, kLeaf7C, kLeaf7D, kLeaf7_1A, kLeaf7_1D, kCpuWords };

struct CpuFeature {
  const char* name;  // as in the compilers' -m flags
  CpuWord word;      // of what cpuid answers
  int bit;
  uint32_t saved;  // bits of XCR0 that must be set: register files that survive a context switch
};

constexpr uint32_t kAny = 0, kYmm = 0x06, kZmm = 0xE6;
constexpr CpuFeature kCpuFeatures[] = {
    {"sse2", kLeaf1D, 26, kAny},
    {"ssse3", kLeaf1C, 9, kAny},
    {"sse4.1", kLeaf1C, 19, kAny},
    {"sse4.2", kLeaf1C, 20, kAny},
    {"popcnt", kLeaf1C, 23, kAny},
    {"avx", kLeaf1C, 28, kYmm},
    {"f16c", kLeaf1C, 29, kYmm},
    {"fma", kLeaf1C, 12, kYmm},
    {"bmi2", kLeaf7B, 8, kAny},
    {"avx2", kLeaf7B, 5, kYmm},
    {"avx512f", kLeaf7B, 16, kZmm},
    {"avx512bw", kLeaf7B, 30, kZmm},
    {"avx512vl", kLeaf7B, 31, kZmm},
    {"avx512dq", kLeaf7B, 17, kZmm},
    {"avx512cd", kLeaf7B, 28, kZmm},
    {"avx512ifma", kLeaf7B, 21, kZmm},
    {"avx512vbmi", kLeaf7C, 1, kZmm},
    {"avx512vbmi2", kLeaf7C, 6, kZmm},
    {"avx512vnni", kLeaf7C, 11, kZmm},
    {"avx512bitalg", kLeaf7C, 12, kZmm},
    {"avx512vpopcntdq", kLeaf7C, 14, kZmm},
    {"avx512fp16", kLeaf7D, 23, kZmm},
    {"avx512bf16", kLeaf7_1A, 5, kZmm},
    {"avxvnni", kLeaf7_1A, 4, kYmm},
    {"avxvnniint8", kLeaf7_1D, 4, kYmm},
};

struct CpuState {
  uint32_t words[kCpuWords] = {};
  uint32_t saved = 0;  // XCR0

  SKIVE_ANY_CPU CpuState() {
    uint32_t a = 0, b = 0, c = 0;
    if (!__get_cpuid(1, &a, &b, &words[kLeaf1C], &words[kLeaf1D])) return;
    if ((words[kLeaf1C] >> 27) & 1) {  // xgetbv may be used
      uint32_t high = 0;
      __asm__ volatile("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
    }
    if (!__get_cpuid_count(7, 0, &a, &words[kLeaf7B], &words[kLeaf7C], &words[kLeaf7D])) return;
    if (a >= 1) __get_cpuid_count(7, 1, &words[kLeaf7_1A], &b, &c, &words[kLeaf7_1D]);
  }
  SKIVE_ANY_CPU bool has(const CpuFeature& f) const {
    return (words[f.word] >> f.bit) & 1 && (saved & f.saved) == f.saved;
  }
};

#elif defined(__aarch64__) && defined(__linux__)

struct CpuFeature {
  const char* name;
  int word;  // 0: AT_HWCAP, 1: AT_HWCAP2; bit numbers are those of the kernel's asm/hwcap.h
  int bit;
};
constexpr CpuFeature kCpuFeatures[] = {
    {"simd", 0, 1}, {"fp16", 0, 10}, {"dotprod", 0, 20}, {"sve", 0, 22}, {"i8mm", 1, 13}};

struct CpuState {
  unsigned long words[2] = {getauxval(AT_HWCAP), getauxval(AT_HWCAP2)};
  bool has(const CpuFeature& f) const { return (words[f.word] >> f.bit) & 1; }
};

#else

struct CpuFeature {
  const char* name;
};
constexpr CpuFeature kCpuFeatures[] = {{"none"}};

struct CpuState {
  bool has(const CpuFeature&) const { return false; }
};

#endif

// True if this processor has all of the named features; a name that is not in the table is one it lacks.
template <int N>
SKIVE_ANY_CPU bool cpu_has(const char* const (&names)[N]) {
  const CpuState cpu;
  for (const char* name : names) {
    bool found = false;
    for (const CpuFeature& f : kCpuFeatures)
      if (!__builtin_strcmp(f.name, name)) found = cpu.has(f);
    if (!found) return false;
  }
  return true;
}

}  // namespace SKIVE_ISA
}  // namespace skive

#endif  // SKIVE_CPU_H
