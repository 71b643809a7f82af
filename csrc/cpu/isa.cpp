#include "cpu/isa.h"

#include <cstdlib>
#include <stdexcept>

#include "cpu/kernels.h"

namespace vggt_mv {

namespace portable {
extern const CpuKernels kernels;
}
namespace avx2 {
extern const CpuKernels kernels;
}
namespace avx512 {
extern const CpuKernels kernels;
}
namespace avx512_bf16 {
extern const CpuKernels kernels;
}

namespace {

struct Variant {
  const char* name;
  const CpuKernels* kernels;
  bool (*is_usable)();
};

#if defined(VGGT_MV_HAS_AVX2)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

#if defined(VGGT_MV_EMULATE_AVX512)
bool has_avx512() { return has_avx2(); }
bool has_avx512_bf16() { return has_avx2(); }
#else
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif
#endif

constexpr Variant kVariants[] = {
    {"portable", &portable::kernels, [] { return true; }},
#if defined(VGGT_MV_HAS_AVX2)
    {"avx2", &avx2::kernels, has_avx2},
#endif
#if defined(VGGT_MV_HAS_AVX512)
    {"avx512", &avx512::kernels, has_avx512},
#endif
#if defined(VGGT_MV_HAS_AVX512_BF16)
    {"avx512_bf16", &avx512_bf16::kernels, has_avx512_bf16},
#endif
};

const Variant* in_use = nullptr;

std::string joined(const std::vector<std::string>& names) {
  std::string result;
  for (const std::string& name : names) result += (result.empty() ? "" : ", ") + name;
  return result;
}

}  // namespace

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
  for (const Variant& variant : kVariants) names.emplace_back(variant.name);
  return names;
}

std::vector<std::string> usable_isas() {
  std::vector<std::string> names;
  for (const Variant& variant : kVariants) {
    if (variant.is_usable()) names.emplace_back(variant.name);
  }
  return names;
}

void set_cpu_isa(const std::string& name, const char* source) {
  for (const Variant& variant : kVariants) {
    if (name == variant.name && variant.is_usable()) {
      in_use = &variant;
      return;
    }
  }
  throw std::invalid_argument(std::string(source) + ": must be one of " + joined(usable_isas()) +
                              " on this machine; got '" + name + "'");
}

void select_cpu_isa() {
  const char* wanted = std::getenv("VGGT_MV_CPU_ISA");
  if (wanted != nullptr && *wanted != '\0') {
    set_cpu_isa(wanted, "environment variable VGGT_MV_CPU_ISA");
  } else {
    set_cpu_isa(usable_isas().back());
  }
}

std::string cpu_isa() { return in_use->name; }

const CpuKernels& cpu_kernels() { return *in_use->kernels; }

}  // namespace vggt_mv
