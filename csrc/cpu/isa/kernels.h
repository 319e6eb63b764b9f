// The table of functions that isa/kernels.cpp offers to the driver, one table per instruction set. They loop over rows;
// threads and memory are the driver's.
//
// A *panel* is one output channel's kernel in the layout that sums are computed in: [taps][columns], with a column per
// input channel. T is the precision of the arithmetic, float or double. Arrays over terms are null where a term has no
// such thing.
#pragma once

#include "../../squeeze.h"

namespace orepa::cpu {

// Output channels that are processed together, term by term.
constexpr std::int64_t channel_block = 8;

// Sums over output channels and `taps` taps are computed as partial sums over this many channels, counted from the
// group's first. A partial sum has at least 256 products, as adding partial sums up costs time, and not many more, as
// its rounding error grows with its length.
constexpr std::int64_t channels_per_partial_sum(std::int64_t taps) {
  std::int64_t channels = channel_block;
  while (channels * taps < 256) channels *= 2;
  return channels;
}

// Operands that all output channels of a group share, repacked, group after group.
template <class T>
struct Packed {
  const T* depthwise[max_terms] = {};  // separable terms, by `pack_depthwise`
  const T* first[max_terms] = {};      // composed terms, by `pack_first`
};

// Backward: gradients that are sums over output channels.
template <class T>
struct ChannelSums {
  T* depthwise[max_terms] = {};  // accumulated over output channels, laid out as by `pack_depthwise`
  T* filters[max_terms] = {};    // [O][taps], not summed yet
};

// Backward: the operands of the product that is the gradient of a, for output channels [begin, end). A chunk is a part
// of one group, or one or more entire groups.
template <class T>
struct Chunk {
  std::int64_t begin = 0, end = 0;
  T* im2col[max_terms] = {};  // dW times the scale, packed, group after group
  T* second[max_terms] = {};  // [o][tap of b][inner]: b converted to T, null where it needs no conversion
};

template <class T>
struct Kernels {
  // Packed operands are padded: depthwise kernels to whole vectors of channels, right matrices of products to whole
  // tiles of columns.
  std::int64_t vector_width, tile_width;

  // view(row, column, tap) = panels[row][tap][column], for rows [begin, end).
  void (*unpack)(const T* panels, std::int64_t columns, std::int64_t taps, const View& view, std::int64_t begin,
                 std::int64_t end);

  // Pack the depthwise kernels of one group, vectors [begin, end) of its input channels, the last one padded.
  void (*pack_depthwise)(const Block& block, const Term& term, std::int64_t group, T* out, std::int64_t begin,
                         std::int64_t end);
  void (*unpack_depthwise)(const Block& block, const Term& term, std::int64_t group, const T* in);

  // Pack a of one group (plus the identity where the term has it) as the right matrix of a product, tiles [begin, end):
  // [inner, taps of a * Ig], or transposed.
  void (*pack_first)(const Block& block, const Term& term, std::int64_t group, bool transposed, T* out,
                     std::int64_t begin, std::int64_t end);

  // Store the gradient of a of one group, inner channels [begin, end), from total[inner][taps of a * Ig, padded].
  void (*unpack_first)(const Block& block, const Term& term, std::int64_t group, const T* total, std::int64_t begin,
                       std::int64_t end);

  // Compute W for output channels [begin, end): the scaled, centred sum of all terms (paper Eq. 4). `scratch` has the
  // driver's `scratch_size`.
  void (*forward)(const Block& block, const Packed<T>& packed, T* scratch, std::int64_t begin, std::int64_t end);

  // Compute the gradients of output channels [begin, end) of one group. Gradients that are sums over output channels
  // are left unfinished in `sums` and `chunk`. `packed.first` is transposed.
  void (*backward)(const Block& block, const Packed<T>& packed, const ChannelSums<T>& sums, const Chunk<T>& chunk,
                   T* scratch, std::int64_t begin, std::int64_t end);

  // total[m][taps of a * Ig, padded], for inner channels m of [begin, end): one chunk's contribution to the gradient of
  // a of one group; added to `total`, or written where `accumulate` is false.
  void (*first_gradient)(const Block& block, const Chunk<T>& chunk, std::int32_t term, std::int64_t group, T* total,
                         bool accumulate, std::int64_t begin, std::int64_t end);
};

// Return the kernels for the widest vectors that this processor has.
template <class T>
const Kernels<T>& kernels();
template <>
const Kernels<float>& kernels<float>();
template <>
const Kernels<double>& kernels<double>();

}  // namespace orepa::cpu
