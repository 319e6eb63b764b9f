// What a squeeze is, as plain structs: the contract between Python (which owns all memory) and the kernels.
//
// A block's kernel is W[o, i, p], with o an output channel, i an input channel within its group and p = h * kw + w a
// tap. It is the sum of terms (paper Eq. 4), each scaled per output channel and centred:
//
//   dense      K[o,i,p] = a[o,i,p]
//   pointwise  K[o,i,p] = a[o,i] * b[o,p]                a absent: identity, delta(i, o mod Ig); b absent: 1 / (kh *
//   kw) composed   K[o,i,p] = sum_m sum_q b[o,m,q] a[m,i,p-q]    (paper Eq. 3); with `identity`, (a + id) for a
//   separable  K[o,i,p] = sum_e b[o, i*E+e] a[i*E+e, p]  b absent: K[o,i,p] = a[o,p] where i = o / E, else 0
//
// Nested blocks are no matter of this file: Python squeezes them first and passes their kernels as operands.
#pragma once

#include <cstdint>

namespace orepa {

enum class Type : std::int32_t { float64 = 0, float32 = 1, bfloat16 = 2, float16 = 3 };

enum class Kind : std::int32_t { dense = 0, pointwise = 1, composed = 2, separable = 3 };

// Terms of one block. The most of any published block is 9 (MobileOne with four branches and more).
constexpr int max_terms = 12;

// A tensor as rows, columns and taps; element (r, c, t) lies at data + (r * row + c * column + t * tap) elements.
// A null `data` means that the tensor is absent, or its gradient not asked for.
struct View {
  void* data = nullptr;
  std::int64_t row = 0, column = 0, tap = 0;
  Type type = Type::float32;
};

struct Term {
  Kind kind = Kind::dense;
  std::int32_t scale = -1;                         // row of the block's scales, or -1
  std::int32_t height = 1, width = 1;              // of the term's kernel, before it is centred
  std::int32_t first_height = 1, first_width = 1;  // composed: of a; that of b follows
  std::int32_t inner = 0;                          // composed: channels of a per group; separable: E
  bool identity = false;                           // composed, with a 1x1
  // Rows x columns x taps: dense [O, Ig, k]; pointwise a [O, Ig, 1], b [O, 1, k] (row stride 0 where shared by all o);
  // composed a [g * inner, Ig, k1], b [O, inner, k2]; separable a [I * E, 1, k], b [O, Ig * E, 1].
  View a, b;
  View grad_a, grad_b;  // backward: where the gradients go
};

struct Block {
  std::int64_t out_channels = 0, in_per_group = 0, groups = 1;
  std::int32_t height = 1, width = 1;
  std::int32_t terms = 0;
  Term term[max_terms];
  View scales;       // [branch, O, 1]: row = branch, column = o; column stride 0 for scalar scaling
  View grad_scales;  // the same, always with a column per o: Python adds them up for scalar scaling
  View kernel;       // W forward (written), dW backward (read)

  std::int64_t out_per_group() const { return out_channels / groups; }
  std::int32_t taps() const { return height * width; }
};

}  // namespace orepa
