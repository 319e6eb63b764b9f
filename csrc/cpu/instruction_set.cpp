// The choice among the instruction sets that isa/kernels.cpp is compiled for.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "api.h"
#include "isa/kernels.h"

namespace orepa::cpu {

#define OREPA_DECLARE(isa)                     \
  namespace isa {                              \
  extern const Kernels<float> float_kernels;   \
  extern const Kernels<double> double_kernels; \
  }
OREPA_DECLARE(baseline)
#ifdef OREPA_X86_KERNELS
OREPA_DECLARE(avx2)
OREPA_DECLARE(avx512)
#endif
#undef OREPA_DECLARE

enum class Isa { baseline, avx2, avx512 };

constexpr const char* isa_names[] = {"baseline", "avx2", "avx512"};

static Isa best_isa() {
#ifdef OREPA_X86_KERNELS
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::baseline;
}

// The best that this processor has, unless OREPA_CPU_ISA asks for less.
static Isa choose_isa() {
  const char* const requested = std::getenv("OREPA_CPU_ISA");
  if (requested == nullptr || *requested == '\0') return best_isa();
  for (const Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512})
    if (std::strcmp(requested, isa_names[static_cast<int>(isa)]) == 0) return std::min(isa, best_isa());
  throw std::invalid_argument("OREPA_CPU_ISA must be baseline, avx2 or avx512, got " + std::string(requested));
}

static Isa current_isa() {
  static const Isa isa = choose_isa();
  return isa;
}

const char* instruction_set() {
  return isa_names[static_cast<int>(current_isa())];
}

template <>
const Kernels<float>& kernels<float>() {
#ifdef OREPA_X86_KERNELS
  if (current_isa() == Isa::avx512) return avx512::float_kernels;
  if (current_isa() == Isa::avx2) return avx2::float_kernels;
#endif
  return baseline::float_kernels;
}

template <>
const Kernels<double>& kernels<double>() {
#ifdef OREPA_X86_KERNELS
  if (current_isa() == Isa::avx512) return avx512::double_kernels;
  if (current_isa() == Isa::avx2) return avx2::double_kernels;
#endif
  return baseline::double_kernels;
}

bool supports_type([[maybe_unused]] Type type) {
#ifdef __FLT16_MANT_DIG__
  return true;
#else
  return type != Type::float16;
#endif
}

}  // namespace orepa::cpu
