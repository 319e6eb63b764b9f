// Sums of products of a tile: the three matrix products of the composition W2 o W1 (paper Eq. 3) and its gradients.
#pragma once

#include "mma.cuh"
#include "operand_tile.cuh"

namespace orepa::cuda {

// The sums of one thread, in the C fragments of mma.m16n8k16 with or without tensor cores.
template <class Tile>
struct Sums {
  static constexpr int down = Tile::warp_rows / 16, across = Tile::warp_cols / 8;
  float value[down][across][4];

  __device__ __forceinline__ Sums() {
#pragma unroll
    for (int r = 0; r < down; ++r)
#pragma unroll
      for (int c = 0; c < across; ++c)
#pragma unroll
        for (int k = 0; k < 4; ++k) value[r][c][k] = 0.0f;
  }

  static __device__ __forceinline__ int first_row() { return warp_index() / Tile::warps_across * Tile::warp_rows; }
  static __device__ __forceinline__ int first_column() { return warp_index() % Tile::warps_across * Tile::warp_cols; }

  // visit(row, column, value) for each sum of this thread
  template <class Visit>
  __device__ __forceinline__ void each(const Visit& visit) const {
    const int row = first_row() + lane_index() / 4, column = first_column() + lane_index() % 4 * 2;
#pragma unroll
    for (int r = 0; r < down; ++r)
#pragma unroll
      for (int c = 0; c < across; ++c)
#pragma unroll
        for (int k = 0; k < 4; ++k) visit(row + 16 * r + k / 2 * 8, column + 8 * c + k % 2, value[r][c][k]);
  }

  __device__ __forceinline__ void write(float* result) const {
    each([&](int row, int column, float sum) { result[row * Tile::pitch + column] = sum; });
  }
};

// One operand of a product. Its lines are rows (or columns) and its channels depth, or, `Transposed`, the other way
// round.
template <class Lines>
struct Operand {
  Source source;
  Lines lines;
  int first_channel, channel_limit;  // of the tile, where channels are not the depth
  bool exact;                        // TF32 holds all that the elements, times their factors, have
};

// The pitch of an operand's lines in shared memory.
template <class Tile, bool AlongDepth, int Lines>
constexpr int pitch_of = AlongDepth ? Tile::along_depth : Lines + Tile::across_depth;

// What the elements of A are multiplied by: each line has a factor, be it a row or, transposed, a depth.
template <bool Transposed>
__device__ __forceinline__ float2 two_factors(const float* factors, int line, int k) {
  if constexpr (Transposed) return *reinterpret_cast<const float2*>(factors + k);
  return make_float2(factors[line], factors[line]);
}

// Depths k and k + 1 of a row (or column) of an operand.
template <bool AlongDepth, int Pitch>
__device__ __forceinline__ float2 two_depths(const float* patch, int line, int k) {
  if constexpr (AlongDepth) return *reinterpret_cast<const float2*>(patch + line * Pitch + k);
  return make_float2(patch[k * Pitch + line], patch[(k + 1) * Pitch + line]);
}

#if OREPA_MMA

// A value as TF32 and the rest of it as bfloat16. With three products,
//   a * b = tf32(a) * tf32(b) + rest(a) * b + a * rest(b),
// the last two in bfloat16 at half the price of the first each, the relative error is near 2^-20. Three bfloat16
// products would cost a quarter less, but leave 2^-18.
struct Pieces {
  unsigned tf32[2];  // of two depths
  unsigned rest;     // of both, as bfloat16

  __device__ __forceinline__ explicit Pieces(float2 value, float2 factor = make_float2(1.0f, 1.0f)) {
    value.x *= factor.x;
    value.y *= factor.y;
    tf32[0] = to_tf32(value.x);
    tf32[1] = to_tf32(value.y);
    rest = to_bfloat16_pair(value.x - __uint_as_float(tf32[0]), value.y - __uint_as_float(tf32[1]));
  }
};

// Two TF32 as bfloat16: good enough to be multiplied by a rest. Cut off, they would double the error of the whole.
__device__ __forceinline__ unsigned near(unsigned first, unsigned second) {
  return to_bfloat16_pair(__uint_as_float(first), __uint_as_float(second));
}

// sums += A * B over one step of depth, both operands in shared memory. A TF32 fragment takes depths c and c + 4 from
// lane c, a bfloat16 one 2c and 2c + 1: both are given 2c and 2c + 1, since any order of depths will do if A and B
// agree on it.
template <class Tile, bool TransposedA, bool TransposedB>
__device__ __forceinline__ void multiply_step(Sums<Tile>& sums, const float* a, const float* factors, const float* b,
                                              bool rest_a, bool rest_b) {
  using S = Sums<Tile>;
  constexpr int pitch_a = pitch_of<Tile, !TransposedA, Tile::rows>, pitch_b = pitch_of<Tile, TransposedB, Tile::cols>;
  const int row = S::first_row() + lane_index() / 4, column = S::first_column() + lane_index() / 4;
#pragma unroll 1
  for (int k0 = 0; k0 < Tile::depth; k0 += 16) {
    const int k = k0 + lane_index() % 4 * 2;
    unsigned tf32_a[S::down][2][4], rest_of_a[S::down][4], near_a[S::down][4];
#pragma unroll
    for (int r = 0; r < S::down; ++r)
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // rows g and g + 8 of the first eight depths, then of the others
        const int line = row + 16 * r + i % 2 * 8, depth = k + i / 2 * 8;
        const Pieces piece(two_depths<!TransposedA, pitch_a>(a, line, depth),
                           two_factors<TransposedA>(factors, line, depth));
        tf32_a[r][i / 2][i % 2] = piece.tf32[0];
        tf32_a[r][i / 2][i % 2 + 2] = piece.tf32[1];
        rest_of_a[r][i] = piece.rest;
        near_a[r][i] = near(piece.tf32[0], piece.tf32[1]);
      }
#pragma unroll
    for (int c = 0; c < S::across; ++c) {
      const Pieces early(two_depths<TransposedB, pitch_b>(b, column + 8 * c, k));
      const Pieces late(two_depths<TransposedB, pitch_b>(b, column + 8 * c, k + 8));
      const unsigned near_b[2] = {near(early.tf32[0], early.tf32[1]), near(late.tf32[0], late.tf32[1])};
      const unsigned rest_of_b[2] = {early.rest, late.rest};
#pragma unroll
      for (int r = 0; r < S::down; ++r) {
        // Tensor cores cut sums off, always towards zero: over a thousand depths, that would come to more than all
        // else. So they add up sixteen depths from zero, and an addition that rounds takes those to the sum. This order
        // of the four spills no registers.
        float part[4];
        mma_tf32(part, tf32_a[r][0], early.tf32, {0.0f, 0.0f, 0.0f, 0.0f});
        if (rest_a) mma_bfloat16(part, rest_of_a[r], near_b, part);
        if (rest_b) mma_bfloat16(part, near_a[r], rest_of_b, part);
        mma_tf32(part, tf32_a[r][1], late.tf32, part);
#pragma unroll
        for (int k = 0; k < 4; ++k) sums.value[r][c][k] += part[k];
      }
    }
  }
}

#else

// The same in float32, for GPUs whose tensor cores know neither TF32 nor bfloat16.
template <class Tile, bool TransposedA, bool TransposedB>
__device__ __forceinline__ void multiply_step(Sums<Tile>& sums, const float* a, const float* factors, const float* b,
                                              bool, bool) {
  using S = Sums<Tile>;
  constexpr int pitch_a = pitch_of<Tile, !TransposedA, Tile::rows>, pitch_b = pitch_of<Tile, TransposedB, Tile::cols>;
  const int row = S::first_row() + lane_index() / 4, column = S::first_column() + lane_index() % 4 * 2;
#pragma unroll 2
  for (int k = 0; k < Tile::depth; k += 2) {
    float2 value_a[S::down][2], value_b[S::across][2];
#pragma unroll
    for (int r = 0; r < 2 * S::down; ++r) {
      const float2 value = two_depths<!TransposedA, pitch_a>(a, row + 8 * r, k);
      const float2 factor = two_factors<TransposedA>(factors, row + 8 * r, k);
      value_a[r / 2][r % 2] = make_float2(factor.x * value.x, factor.y * value.y);
    }
#pragma unroll
    for (int c = 0; c < 2 * S::across; ++c)
      value_b[c / 2][c % 2] = two_depths<TransposedB, pitch_b>(b, column + c / 2 * 8 + c % 2, k);
#pragma unroll
    for (int r = 0; r < S::down; ++r)
#pragma unroll
      for (int c = 0; c < S::across; ++c)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sums.value[r][c][i] += value_a[r][i / 2].x * value_b[c][i % 2].x;
          sums.value[r][c][i] += value_a[r][i / 2].y * value_b[c][i % 2].y;
        }
  }
}

#endif

// For operands whose lines and factors stay the same over the whole depth.
struct SameTables {
  __device__ __forceinline__ void lines(int, int) const {}
  __device__ __forceinline__ void factors(int, int) const {}
};

// sums += A * B over depth begin .. end, with all of float32's precision if `full`, else with TF32's. `tables` fills
// those of a stage, for depths k .. k + depth. Shared memory may be in use by nobody on entry, and is not on return.
template <class Tile, bool TransposedA, bool TransposedB, class LinesA, class LinesB, class Tables>
__device__ __forceinline__ void multiply(Sums<Tile>& sums, const Shared<Tile>& shared, const Operand<LinesA>& a,
                                         const Operand<LinesB>& b, int begin, int end, bool full,
                                         const Tables& tables) {
  using PatchA = Patch<Tile, TransposedA ? Tile::depth : Tile::rows, TransposedA ? Tile::rows : Tile::depth,
                       pitch_of<Tile, !TransposedA, Tile::rows>>;
  using PatchB = Patch<Tile, TransposedB ? Tile::cols : Tile::depth, TransposedB ? Tile::depth : Tile::cols,
                       pitch_of<Tile, TransposedB, Tile::cols>>;
  const bool rest_a = full && !a.exact, rest_b = full && !b.exact;
  const auto fetch = [&](int k, int stage) {
    const int line_a = LinesA::in_table ? 0 : TransposedA ? k : a.first_channel;
    const int line_b = LinesB::in_table ? 0 : TransposedB ? b.first_channel : k;
    PatchA::fetch(shared.a(stage), a.source, a.lines, stage, line_a, TransposedA ? a.first_channel : k,
                  TransposedA ? a.channel_limit : end);
    PatchB::fetch(shared.b(stage), b.source, b.lines, stage, line_b, TransposedB ? k : b.first_channel,
                  TransposedB ? end : b.channel_limit);
  };
  tables.lines(begin, 0);
  __syncthreads();
  fetch(begin, 0);
  tables.factors(begin, 0);
  tables.lines(begin + Tile::depth, 1);
  wait_for_copies();
  __syncthreads();
  int stage = 0;
#pragma unroll 1
  for (int k = begin; k < end; k += Tile::depth) {
    // One barrier a step: of the other stage the patches and factors are written, of this one the lines of its next
    // use.
    const int next = k + Tile::depth;
    if (next < end) {
      fetch(next, stage ^ 1);
      tables.factors(next, stage ^ 1);
    }
    tables.lines(next + Tile::depth, stage);
    multiply_step<Tile, TransposedA, TransposedB>(sums, shared.a(stage),
                                                  shared.factors() + (TransposedA ? stage * Tile::depth : 0),
                                                  shared.b(stage), rest_a, rest_b);
    wait_for_copies();
    __syncthreads();
    stage ^= 1;
  }
}

}  // namespace orepa::cuda
