// Sizes of terms. All of it is static, so that every instruction set has its own.
#pragma once

#include "../squeeze.h"

namespace orepa::cpu {

[[maybe_unused]] static std::int64_t taps_of(const Term& term) {
  return std::int64_t{term.height} * term.width;
}

[[maybe_unused]] static std::int64_t taps_of_a(const Term& term) {
  return std::int64_t{term.first_height} * term.first_width;
}

// The b of a composed term.
[[maybe_unused]] static std::int64_t taps_of_b(const Term& term) {
  return std::int64_t{term.height - term.first_height + 1} * (term.width - term.first_width + 1);
}

// How many elements of a composed term's a belong to one inner channel.
[[maybe_unused]] static std::int64_t width_of(const Block& block, const Term& term) {
  return taps_of_a(term) * block.in_per_group;
}

// The factor of a term that has a row for each output channel, its gradient, and how many elements such a row has.
struct OutputRows {
  const View &factor, &gradient;
  std::int64_t elements;
};

[[maybe_unused]] static OutputRows output_rows(const Block& block, const Term& term) {
  switch (term.kind) {
    case Kind::composed:
      return {term.b, term.grad_b, term.inner * taps_of_b(term)};
    case Kind::separable:
      return {term.b, term.grad_b, term.inner * block.in_per_group};
    case Kind::pointwise:
      return {term.a, term.grad_a, block.in_per_group};
    default:
      return {term.a, term.grad_a, taps_of(term) * block.in_per_group};
  }
}

}  // namespace orepa::cpu
