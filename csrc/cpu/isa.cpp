#include "cpu/isa.h"

#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace cpo {
namespace {

struct Entry {
  Isa isa;
  const char* name;
  const RowKernels* rows;
};

const Entry kEntries[] = {
    {Isa::kScalar, "scalar", &kRowKernelsScalar},
#if defined(__x86_64__)
    {Isa::kAvx2, "avx2", &kRowKernelsAvx2},
    {Isa::kAvx512, "avx512", &kRowKernelsAvx512},
    {Isa::kAvx512Bf16, "avx512bf16", &kRowKernelsAvx512Bf16},
#elif defined(__aarch64__)
    {Isa::kNeon, "neon", &kRowKernelsNeon},
#endif
};

#if defined(__x86_64__)
// Asked once: CPUID leaves a virtual machine, which takes longer than a small product.
bool has_f16c() {
  static const bool has = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
  }();
  return has;
}

// __builtin_cpu_supports also asks whether the operating system saves the wide registers.
bool machine_runs(Isa isa) {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  switch (isa) {
    case Isa::kScalar: return true;
    case Isa::kAvx2: return avx2;
    case Isa::kAvx512: return avx512;
    case Isa::kAvx512Bf16: return avx512 && __builtin_cpu_supports("avx512bf16");
    case Isa::kNeon: return false;
  }
  return false;
}
#else
// NEON is part of every 64-bit ARM processor.
bool machine_runs(Isa) { return true; }
#endif

std::string join(const std::vector<std::string>& names) {
  std::string out;
  for (const std::string& name : names) out += (out.empty() ? "" : ", ") + name;
  return out;
}

}  // namespace

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
  for (const Entry& entry : kEntries) names.push_back(entry.name);
  return names;
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Entry& entry : kEntries) {
    if (machine_runs(entry.isa)) names.push_back(entry.name);
  }
  return names;
}

Isa parse_isa(const std::string& name) {
  for (const Entry& entry : kEntries) {
    if (name == entry.name && machine_runs(entry.isa)) return entry.isa;
  }
  throw std::invalid_argument("instruction set '" + name + "' cannot be used; compiled in: " + join(compiled_isas()) +
                              "; of these, this machine runs: " + join(supported_isas()));
}

const RowKernels& row_kernels(Isa isa) {
  for (const Entry& entry : kEntries) {
    if (entry.isa == isa) return *entry.rows;
  }
  return kRowKernelsScalar;
}

}  // namespace cpo
