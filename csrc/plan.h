// A plan: a block's structure, parsed once. Every call binds it to tensors.
#pragma once

#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "squeeze.h"

namespace orepa {

// Views as Python passes them, five numbers each: address, type, strides of rows, columns and taps.
constexpr std::size_t view_fields = 5;
using Views = std::vector<std::int64_t>;

inline View view_at(const Views& views, std::size_t index) {
  const std::int64_t* field = views.data() + view_fields * index;
  return {reinterpret_cast<void*>(field[0]), field[2], field[3], field[4], static_cast<Type>(field[1])};
}

// A block without memory. Operands are indexed as in Python's `Block.operands`.
class Plan {
 public:
  // kind, scale, (height, width), (first_height, first_width), inner, identity, index of a or -1, index of b or -1
  using TermFields = std::tuple<int, int, std::pair<int, int>, std::pair<int, int>, int, bool, int, int>;

  Plan(std::int64_t out_channels, std::int64_t in_per_group, std::int64_t groups, std::pair<int, int> kernel_size,
       const std::vector<TermFields>& terms, int scales, int operands)
      : scales_(scales), operands_(static_cast<std::size_t>(operands)) {
    if (terms.size() > max_terms)
      throw std::invalid_argument("a block has " + std::to_string(terms.size()) + " terms; the kernels take at most " +
                                  std::to_string(max_terms));
    block_.out_channels = out_channels;
    block_.in_per_group = in_per_group;
    block_.groups = groups;
    std::tie(block_.height, block_.width) = kernel_size;
    for (const TermFields& fields : terms) {
      Term& term = block_.term[block_.terms++];
      const auto& [kind, scale, size, first_size, inner, identity, a, b] = fields;
      term.kind = static_cast<Kind>(kind);
      term.scale = scale;
      std::tie(term.height, term.width) = size;
      std::tie(term.first_height, term.first_width) = first_size;
      term.inner = inner;
      term.identity = identity;
      operand_indices_.emplace_back(a, b);
    }
  }

  // The block with operands, for forward.
  Block bind(const Views& operands) const {
    check(operands);
    Block block = block_;
    for (std::int32_t index = 0; index < block.terms; ++index) {
      const auto [a, b] = operand_indices_[index];
      if (a >= 0) block.term[index].a = view_at(operands, a);
      if (b >= 0) block.term[index].b = view_at(operands, b);
    }
    if (scales_ >= 0) block.scales = view_at(operands, scales_);
    return block;
  }

  // The block with operands and gradients, for backward; gradients that are not needed have the address 0.
  Block bind(const Views& operands, const Views& gradients) const {
    check(gradients);
    Block block = bind(operands);
    for (std::int32_t index = 0; index < block.terms; ++index) {
      const auto [a, b] = operand_indices_[index];
      if (a >= 0) block.term[index].grad_a = view_at(gradients, a);
      if (b >= 0) block.term[index].grad_b = view_at(gradients, b);
    }
    if (scales_ >= 0) block.grad_scales = view_at(gradients, scales_);
    return block;
  }

 private:
  void check(const Views& views) const {
    if (views.size() != view_fields * operands_)
      throw std::invalid_argument("a plan of " + std::to_string(operands_) + " operands got " +
                                  std::to_string(views.size()) + " numbers, not five for each");
  }

  Block block_;
  std::vector<std::pair<int, int>> operand_indices_;
  int scales_;
  std::size_t operands_;
};

}  // namespace orepa
