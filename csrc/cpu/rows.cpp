// The arithmetic of the squeeze on a CPU, row by row. CMake compiles this file once per instruction set, each time with
// its own OREPA_ISA: attributes such as target_clones reach neither templates nor the bodies of OpenMP regions. Nothing
// here may come from a header with inline functions: the linker would keep one copy, of whichever instruction set.

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels.h"

namespace orepa::cpu::OREPA_ISA {

#include "layout.h"
#include "sums.h"

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

// Calls f(q, r, the block's tap) for each tap q of b and r of a, which meet in that tap (paper Eq. 3).
template <class F>
static void each_meeting(const Block& block, const Term& term, F f) {
  const std::int64_t b_height = term.height - term.first_height + 1, b_width = term.width - term.first_width + 1;
  const Centred at(block, term);
  for (std::int64_t qh = 0; qh < b_height; ++qh)
    for (std::int64_t qw = 0; qw < b_width; ++qw)
      for (std::int64_t rh = 0; rh < term.first_height; ++rh)
        for (std::int64_t rw = 0; rw < term.first_width; ++rw)
          f(qh * b_width + qw, rh * term.first_width + rw, (at.top + qh + rh) * at.block_width + at.left + qw + rw);
}

static std::int64_t taps_of_a(const Term& term) {
  return std::int64_t{term.first_height} * term.first_width;
}

static std::int64_t taps_of_b(const Term& term) {
  return std::int64_t{term.height - term.first_height + 1} * (term.width - term.first_width + 1);
}

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

#include "separable.h"

#include "backward.h"
#include "forward.h"

extern const Kernels<float> float_kernels;
const Kernels<float> float_kernels = {
    pack<float>,    unpack<float>,   pack_depthwise<float>,    unpack_depthwise<float>,
    forward<float>, backward<float>, composed_backward<float>, gather<float>,
};

extern const Kernels<double> double_kernels;
const Kernels<double> double_kernels = {
    pack<double>,    unpack<double>,   pack_depthwise<double>,    unpack_depthwise<double>,
    forward<double>, backward<double>, composed_backward<double>, gather<double>,
};

}  // namespace orepa::cpu::OREPA_ISA
