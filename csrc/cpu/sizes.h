// Sizes that the driver and the kernels share. Functions are static: each instruction set needs its own copy.
#pragma once

#include "../squeeze.h"

namespace orepa::cpu {

template <class T>
static constexpr Type type_of = sizeof(T) == sizeof(double) ? Type::float64 : Type::float32;

[[maybe_unused]] static constexpr std::int64_t round_up(std::int64_t size, std::int64_t unit) {
  return (size + unit - 1) / unit * unit;
}

// Columns of a composed term's a as a matrix with a row per inner channel.
[[maybe_unused]] static std::int64_t columns_of_first(const Block& block, const Term& term) {
  return term.first_taps() * block.in_per_group;
}

// The factor of a term that has a row per output channel, its gradient, and the elements of such a row.
struct ChannelRows {
  const View &factor, &gradient;
  std::int64_t elements;
};

[[maybe_unused]] static ChannelRows channel_rows(const Block& block, const Term& term) {
  switch (term.kind) {
    case Kind::composed:
      return {term.b, term.grad_b, term.inner * term.second_taps()};
    case Kind::separable:
      return {term.b, term.grad_b, term.inner * block.in_per_group};
    case Kind::pointwise:
      return {term.a, term.grad_a, block.in_per_group};
    default:
      return {term.a, term.grad_a, term.taps() * block.in_per_group};
  }
}

}  // namespace orepa::cpu
