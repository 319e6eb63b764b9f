// What the CPU kernels offer to the driver (squeeze.cpp): loops over rows, without threads and without memory of their
// own.
//
// A *panel* is a kernel's row in the layout that everything is computed in: [taps][columns], contiguous. Matrix
// products work on arrays of panels, [rows][taps][columns]. T is the precision of composing, float or double.
#pragma once

#include "../squeeze.h"

namespace orepa::cpu {

// How many output channels a separable term is worked on for at once.
constexpr std::int64_t separable_rows = 8;

template <class T>
struct Kernels {
  // out[row][tap][column] = factor(row) * view(row, column, tap), for rows [begin, end).
  void (*pack)(const View& view, const View& factor, std::int64_t columns, std::int64_t taps, T* out,
               std::int64_t begin, std::int64_t end);

  // view(row, column, tap) = panels[row][tap][column], for rows [begin, end).
  void (*unpack)(const T* panels, std::int64_t columns, std::int64_t taps, const View& view, std::int64_t begin,
                 std::int64_t end);

  // The depthwise kernels of one group, input channels padded to whole vectors.
  void (*pack_depthwise)(const Block& block, const Term& term, std::int64_t group, T* out);
  void (*unpack_depthwise)(const Block& block, const Term& term, std::int64_t group, const T* in);

  // Paper Eq. 4 for output channels [begin, end): the scaled, centred sum of all terms.
  //   products   per term: composed, its matrix product [O][taps of b][taps of a][Ig]
  //   depthwise  per term: separable, packed by `pack_depthwise`, group after group
  //   scratch    see `scratch_size` in squeeze.cpp
  void (*forward)(const Block& block, const T* const* products, const T* const* depthwise, T* scratch,
                  std::int64_t begin, std::int64_t end);

  // Gradients of all terms but the composed ones, and of their scales, for output channels [begin, end) of one group.
  // `panels`, like `product` and `out` below, begins with output channel 0 of the block.
  //   panels          dW as panels: written, unless they are `kernel` itself
  //   grad_depthwise  per term: sums over these channels, laid out as by `pack_depthwise`, added to; or null
  //   grad_filters    per term: [O][taps], written, where the filter wants a gradient
  void (*backward)(const Block& block, T* panels, const T* const* depthwise, T* const* grad_depthwise,
                   T* const* grad_filters, T* scratch, std::int64_t begin, std::int64_t end);

  // Gradient of b and of the scale of a composed term, from `product` = dW a^T, [O][taps of b][inner].
  void (*composed_backward)(const Block& block, const Term& term, const T* panels, const T* product, T* scratch,
                            std::int64_t begin, std::int64_t end);

  // dW gathered for a composed term whose panels are not dW's own: out[o][tap of b][tap of a][Ig].
  void (*gather)(const Block& block, const Term& term, const T* panels, T* out, std::int64_t begin, std::int64_t end);
};

// The kernels for the widest vectors that this processor has.
template <class T>
const Kernels<T>& kernels();

}  // namespace orepa::cpu
