// The arithmetic of the squeeze on a CPU, row by row. CMake compiles this file once per instruction set, each time with
// its own OREPA_ISA: attributes such as target_clones reach neither templates nor the bodies of OpenMP regions. Nothing
// here may come from a header with inline functions: the linker would keep one copy, of whichever instruction set.

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "../sizes.h"
#include "kernels.h"

namespace orepa::cpu::OREPA_ISA {

#include "layout.inl"

#include "prefetch.inl"

#include "gemm.inl"
#include "vector_ops.inl"

// --- geometry -------------------------------------------------------------------------------------------------------

// The taps of a kernel that is centred in the block's.
struct Centred {
  std::int64_t height, width, top, left, block_width;

  Centred(const Block& block, std::int64_t height, std::int64_t width)
      : height(height),
        width(width),
        top((block.height - height) / 2),
        left((block.width - width) / 2),
        block_width(block.width) {}
  Centred(const Block& block, const Term& term) : Centred(block, term.height, term.width) {}

  std::int64_t taps() const { return height * width; }

  // Calls f(tap, the block's tap in the same place) for each tap. To divide tap numbers instead would cost more than
  // what is done with them.
  template <class F>
  void each(F f) const {
    for (std::int64_t h = 0, tap = 0; h < height; ++h)
      for (std::int64_t w = 0; w < width; ++w, ++tap) f(tap, (top + h) * block_width + left + w);
  }
};

template <class T>
static T scale_of(const Block& block, const Term& term, std::int64_t o) {
  return term.scale < 0 ? T{1} : scalar<T>(block.scales, term.scale, o, 1);
}

template <class T>
static void put_scale(const Block& block, const Term& term, std::int64_t o, T gradient) {
  if (term.scale >= 0 && block.grad_scales.data != nullptr) set_scalar(block.grad_scales, term.scale, o, gradient);
}

// The filter of an output channel: a view's row, or the average.
template <class T>
class Filter {
 public:
  Filter(const Term& term, std::int64_t o)
      : values_{term.b.data, term.b.row, term.b.tap, 0, term.b.type},  // taps as columns
        o_(o),
        average_(T{1} / static_cast<T>(term.height * term.width)) {}

  T operator[](std::int64_t tap) const { return scalar<T>(values_, o_, tap, average_); }

 private:
  View values_;
  std::int64_t o_;
  T average_;
};

#include "composed.inl"
#include "separable.inl"

#include "backward.inl"
#include "forward.inl"

template <class T>
constexpr Kernels<T> table = {
    lanes<T>,      tile_width<T>,   unpack<T>,  pack_depthwise<T>, unpack_depthwise<T>,
    pack_first<T>, unpack_first<T>, forward<T>, backward<T>,       add_to_first<T>,
};

extern const Kernels<float> float_kernels;
const Kernels<float> float_kernels = table<float>;

extern const Kernels<double> double_kernels;
const Kernels<double> double_kernels = table<double>;

}  // namespace orepa::cpu::OREPA_ISA
