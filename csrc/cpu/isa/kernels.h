// What the CPU kernels offer to the driver (squeeze.cpp): loops over rows, without threads and without memory of their
// own.
//
// A *panel* is a kernel's row in the layout that sums are computed in: [taps][columns]. T is the precision of
// composing, float or double. Arrays over terms have null where a term has no such thing.
#pragma once

#include "../../squeeze.h"

namespace orepa::cpu {

// How many output channels are worked on at once, term by term.
constexpr std::int64_t rows_at_once = 8;

// Sums over output channels and `taps` taps of each are taken in parts of so many channels, counted from the group's
// first: of at least 256 products, because the parts have to be added up, and not of many more, because of rounding
// errors.
constexpr std::int64_t rows_per_chain(std::int64_t taps) {
  std::int64_t rows = rows_at_once;
  while (rows * taps < 256) rows *= 2;
  return rows;
}

// What all output channels of a group need, group after group.
template <class T>
struct Packed {
  const T* depthwise[max_terms] = {};  // separable, by `pack_depthwise`
  const T* first[max_terms] = {};      // composed, by `pack_first`
};

// Backward: where sums over output channels go.
template <class T>
struct Sums {
  T* depthwise[max_terms] = {};  // of these output channels, laid out as by `pack_depthwise`, added to
  T* filters[max_terms] = {};    // [O][taps], written, where a filter wants a gradient
};

// Backward: what the gradients of a are made of, for some output channels, from `begin`. A piece is a part of one
// group, or one or more whole groups.
template <class T>
struct Piece {
  std::int64_t begin = 0, end = 0;
  T* flow[max_terms] = {};    // dW times the scale, packed for products, group after group
  T* second[max_terms] = {};  // [o][tap of b][inner]: b, where it is of another type
};

template <class T>
struct Kernels {
  // What is packed is padded: depthwise kernels to whole vectors, of so many channels; right matrices of products to
  // whole tiles, of so many columns.
  std::int64_t vector_width, tile_width;

  // view(row, column, tap) = panels[row][tap][column], for rows [begin, end).
  void (*unpack)(const T* panels, std::int64_t columns, std::int64_t taps, const View& view, std::int64_t begin,
                 std::int64_t end);

  // The depthwise kernels of one group, vectors [begin, end) of its input channels, the last padded.
  void (*pack_depthwise)(const Block& block, const Term& term, std::int64_t group, T* out, std::int64_t begin,
                         std::int64_t end);
  void (*unpack_depthwise)(const Block& block, const Term& term, std::int64_t group, const T* in);

  // a of one group (plus the identity where the term has it) as the right matrix of a product, tiles [begin, end):
  // [inner, taps of a * Ig], or transposed.
  void (*pack_first)(const Block& block, const Term& term, std::int64_t group, bool transposed, T* out,
                     std::int64_t begin, std::int64_t end);

  // The gradient of a of one group, channels [begin, end) of its inner ones, from total[inner][taps of a * Ig, padded].
  void (*unpack_first)(const Block& block, const Term& term, std::int64_t group, const T* total, std::int64_t begin,
                       std::int64_t end);

  // Paper Eq. 4 for output channels [begin, end): the scaled, centred sum of all terms. `scratch`: see squeeze.cpp.
  void (*forward)(const Block& block, const Packed<T>& packed, T* scratch, std::int64_t begin, std::int64_t end);

  // The gradients of all factors but those that sum over output channels, for channels [begin, end) of one group; those
  // that do are begun in `sums` and `piece`. `packed.first` is transposed.
  void (*backward)(const Block& block, const Packed<T>& packed, const Sums<T>& sums, const Piece<T>& piece, T* scratch,
                   std::int64_t begin, std::int64_t end);

  // total[m][taps of a * Ig, padded] for m of [begin, end), of inner: what a piece's part of one group contributes to
  // the gradient of a; added, or written where `add` is false.
  void (*add_to_first)(const Block& block, const Piece<T>& piece, std::int32_t term, std::int64_t group, T* total,
                       bool add, std::int64_t begin, std::int64_t end);
};

// The kernels for the widest vectors that this processor has.
template <class T>
const Kernels<T>& kernels();
template <>
const Kernels<float>& kernels<float>();
template <>
const Kernels<double>& kernels<double>();

}  // namespace orepa::cpu
