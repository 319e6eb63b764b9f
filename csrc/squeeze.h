// A squeeze as plain structs: the contract between Python, which owns all memory, and the kernels.
//
// A block's kernel is W[o, i, p]: o is an output channel, i an input channel within its group, p = h * kw + w a tap.
// W is a sum of terms K (paper Eq. 4), each centred in W and scaled per output channel.
//
// clang-format off
//   kind       K[o, i, p]                                 notes
//   dense      a[o, i, p]
//   pointwise  a[o, i] * b[o, p]                          no a: identity, delta(i, o mod Ig); no b: average, 1 / (kh * kw)
//   composed   sum_m sum_q b[o, m, q] * a[m, i, p - q]    paper Eq. 3; with `identity`, (a + id) stands for a
//   separable  sum_e b[o, i * E + e] * a[i * E + e, p]    no b: a[o, p] where i = o / E, else 0
//
// Shapes of the operands, as rows x columns x taps:
//   kind       a                      b
//   dense      O         x Ig x k     -
//   pointwise  O         x Ig x 1     O x 1      x k      row stride 0 where all o share one filter
//   composed   g * inner x Ig x k1    O x inner  x k2     k1 + k2 - 1 = k in both directions
//   separable  I * E     x 1  x k     O x Ig * E x 1
// clang-format on
//
// Nested blocks do not appear here: Python squeezes them first and passes their kernels as operands.
#pragma once

#include <cstdint>

// The CPU kernels include this file once per instruction set. A function that is always inlined leaves no copy behind
// that the linker could choose for a processor without that instruction set.
#define OREPA_INLINE __attribute__((always_inline)) inline

namespace orepa {

enum class Type : std::int32_t { float64 = 0, float32 = 1, bfloat16 = 2, float16 = 3 };

enum class Kind : std::int32_t { dense = 0, pointwise = 1, composed = 2, separable = 3 };

// Terms per block. Published blocks have 9 at most (MobileOne with four or more branches).
constexpr int max_terms = 12;

// A tensor as rows, columns and taps; element (r, c, t) lies at data + (r * row + c * column + t * tap) elements.
// `data` is null where the tensor is absent or its gradient is not needed.
struct View {
  void* data = nullptr;
  std::int64_t row = 0, column = 0, tap = 0;  // strides
  Type type = Type::float32;
};

struct Term {
  Kind kind = Kind::dense;
  std::int32_t scale = -1;                         // row of the block's scales, or -1
  std::int32_t height = 1, width = 1;              // of K before it is centred
  std::int32_t first_height = 1, first_width = 1;  // composed: of a; those of b follow
  std::int32_t inner = 0;                          // composed: channels of a per group; separable: E
  bool identity = false;                           // composed, where a is 1x1
  View a, b;
  View grad_a, grad_b;  // backward only

  OREPA_INLINE std::int64_t taps() const { return std::int64_t{height} * width; }
  // Composed terms.
  OREPA_INLINE std::int32_t second_height() const { return height - first_height + 1; }
  OREPA_INLINE std::int32_t second_width() const { return width - first_width + 1; }
  OREPA_INLINE std::int64_t first_taps() const { return std::int64_t{first_height} * first_width; }
  OREPA_INLINE std::int64_t second_taps() const { return std::int64_t{second_height()} * second_width(); }
};

struct Block {
  std::int64_t out_channels = 0, in_per_group = 0, groups = 1;
  std::int32_t height = 1, width = 1;
  std::int32_t terms = 0;
  Term term[max_terms];
  View scales;       // [branch, O]: row = branch, column = o; column stride 0 for scalar scaling
  View grad_scales;  // likewise, but always a column per o: Python sums them for scalar scaling
  View kernel;       // W forward (written), dW backward (read)

  OREPA_INLINE std::int64_t out_per_group() const { return out_channels / groups; }
  OREPA_INLINE std::int32_t taps() const { return height * width; }
  // Return whether the gradient of a term's scale is needed.
  OREPA_INLINE bool needs_scale_grad(const Term& scaled) const {
    return grad_scales.data != nullptr && scaled.scale >= 0;
  }
};

}  // namespace orepa
