// Which of the kernels that rows.cpp was compiled into are used.
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

// The best that this processor has, or less where OREPA_CPU_ISA says so.
static Isa chosen_isa() {
  const char* const wanted = std::getenv("OREPA_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return best_isa();
  for (const Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512})
    if (std::strcmp(wanted, isa_names[static_cast<int>(isa)]) == 0) return std::min(isa, best_isa());
  throw std::invalid_argument("OREPA_CPU_ISA must be baseline, avx2 or avx512, got " + std::string(wanted));
}

static Isa isa_in_use() {
  static const Isa isa = chosen_isa();
  return isa;
}

const char* instruction_set() {
  return isa_names[static_cast<int>(isa_in_use())];
}

template <>
const Kernels<float>& kernels<float>() {
#ifdef OREPA_X86_KERNELS
  if (isa_in_use() == Isa::avx512) return avx512::float_kernels;
  if (isa_in_use() == Isa::avx2) return avx2::float_kernels;
#endif
  return baseline::float_kernels;
}

template <>
const Kernels<double>& kernels<double>() {
#ifdef OREPA_X86_KERNELS
  if (isa_in_use() == Isa::avx512) return avx512::double_kernels;
  if (isa_in_use() == Isa::avx2) return avx2::double_kernels;
#endif
  return baseline::double_kernels;
}

bool knows([[maybe_unused]] Type type) {
#ifdef __FLT16_MANT_DIG__
  return true;
#else
  return type != Type::float16;
#endif
}

}  // namespace orepa::cpu
