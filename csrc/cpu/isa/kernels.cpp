// The arithmetic of the squeeze on a CPU, output channel by output channel. CMake compiles this file once per
// instruction set, each time with another OREPA_ISA: attributes such as target_clones reach neither templates nor the
// bodies of OpenMP regions. No inline function may come from a header unless it is static or always inlined: of all
// copies the linker would keep one, of any instruction set.

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

// The taps of a term's kernel, centred in the block's.
struct Window {
  std::int64_t height, width, top, left, block_width;

  Window(const Block& block, const Term& term)
      : height(term.height),
        width(term.width),
        top((block.height - height) / 2),
        left((block.width - width) / 2),
        block_width(block.width) {}

  std::int64_t taps() const { return height * width; }

  // Call f(tap, the block's tap in the same place) for each tap. Nested loops, because dividing tap numbers would cost
  // more than f.
  template <class F>
  void each(F f) const {
    for (std::int64_t h = 0, tap = 0; h < height; ++h)
      for (std::int64_t w = 0; w < width; ++w, ++tap) f(tap, (top + h) * block_width + left + w);
  }
};

template <class T>
static T scale_of(const Block& block, const Term& term, std::int64_t o) {
  return term.scale < 0 ? T{1} : load_scalar<T>(block.scales, term.scale, o, 1);
}

template <class T>
static void store_scale_gradient(const Block& block, const Term& term, std::int64_t o, T gradient) {
  if (block.needs_scale_grad(term)) store_scalar(block.grad_scales, term.scale, o, gradient);
}

// A view with its taps as columns.
static View taps_as_columns(const View& view) {
  return {view.data, view.row, view.tap, 0, view.type};
}

// The filter of an output channel: a row of b, or the average.
template <class T>
class Filter {
 public:
  Filter(const Term& term, std::int64_t o)
      : values_(taps_as_columns(term.b)), o_(o), average_(T{1} / static_cast<T>(term.height * term.width)) {}

  T operator[](std::int64_t tap) const { return load_scalar<T>(values_, o_, tap, average_); }

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
    pack_first<T>, unpack_first<T>, forward<T>, backward<T>,       first_gradient<T>,
};

extern const Kernels<float> float_kernels;
const Kernels<float> float_kernels = table<float>;

extern const Kernels<double> double_kernels;
const Kernels<double> double_kernels = table<double>;

}  // namespace orepa::cpu::OREPA_ISA
