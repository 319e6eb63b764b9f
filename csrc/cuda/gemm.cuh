// Matrix products of one tile: of the composition W2 o W1 (paper Eq. 3) and of its two gradients.
#pragma once

#include "mma.cuh"
#include "operand_tile.cuh"

namespace orepa::cuda {

// The accumulators of one thread, in the layout of mma.m16n8k16's C fragments, with or without tensor cores.
template <class Tile>
struct Accumulators {
  static constexpr int down = Tile::warp_rows / 16, across = Tile::warp_cols / 8;
  float value[down][across][4];

  __device__ __forceinline__ Accumulators() {
#pragma unroll
    for (int r = 0; r < down; ++r)
#pragma unroll
      for (int c = 0; c < across; ++c)
#pragma unroll
        for (int k = 0; k < 4; ++k) value[r][c][k] = 0.0f;
  }

  static __device__ __forceinline__ int first_row() { return warp_index() / Tile::warps_across * Tile::warp_rows; }
  static __device__ __forceinline__ int first_column() { return warp_index() % Tile::warps_across * Tile::warp_cols; }

  // Call visit(row, column, value) for each accumulator of this thread.
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

// One operand of a product. Its lines are rows (or columns) and its channels are the depth; if `Transposed`, vice
// versa.
template <class Lines>
struct Operand {
  Source source;
  Lines lines;
  int first_channel, channel_limit;  // of the tile, if channels are not the depth
  bool exact;                        // TF32 represents the elements, times their factors, exactly
};

// The pitch of an operand's lines in shared memory.
template <class Tile, bool AlongDepth, int Lines>
constexpr int pitch_of = AlongDepth ? Tile::along_depth : Lines + Tile::across_depth;

// Factors of the elements of A at depths k and k + 1: each line, a row or (transposed) a depth, has a factor.
template <bool Transposed>
__device__ __forceinline__ float2 two_factors(const float* factors, int line, int k) {
  if constexpr (Transposed) return *reinterpret_cast<const float2*>(factors + k);
  return make_float2(factors[line], factors[line]);
}

// Elements at depths k and k + 1 of a row (or column) of an operand.
template <bool AlongDepth, int Pitch>
__device__ __forceinline__ float2 two_depths(const float* tile, int line, int k) {
  if constexpr (AlongDepth) return *reinterpret_cast<const float2*>(tile + line * Pitch + k);
  return make_float2(tile[k * Pitch + line], tile[(k + 1) * Pitch + line]);
}

#if OREPA_MMA

// A value split into TF32 and a bfloat16 residual. With three products,
//   a * b = tf32(a) * tf32(b) + residual(a) * b + a * residual(b),
// the last two in bfloat16 at half the cost of the first each, the relative error is near 2^-20. Three bfloat16
// products would cost a quarter less, but their error is 2^-18.
struct Tf32Split {
  unsigned tf32[2];   // of two depths
  unsigned residual;  // of both, as a pair of bfloat16

  __device__ __forceinline__ explicit Tf32Split(float2 value, float2 factor = make_float2(1.0f, 1.0f)) {
    value.x *= factor.x;
    value.y *= factor.y;
    tf32[0] = to_tf32(value.x);
    tf32[1] = to_tf32(value.y);
    residual = to_bfloat16_pair(value.x - __uint_as_float(tf32[0]), value.y - __uint_as_float(tf32[1]));
  }
};

// Two TF32 rounded to bfloat16, as factors of residuals. Truncated, they would double the error of the product.
__device__ __forceinline__ unsigned tf32_to_bfloat16_pair(unsigned first, unsigned second) {
  return to_bfloat16_pair(__uint_as_float(first), __uint_as_float(second));
}

// sums += A * B over one step of depth, both operands in shared memory. Lane c of a TF32 fragment holds depths c and
// c + 4, of a bfloat16 fragment 2c and 2c + 1. Here both get 2c and 2c + 1: depths may be permuted, if A and B agree.
template <class Tile, bool TransposedA, bool TransposedB>
__device__ __forceinline__ void gemm_step(Accumulators<Tile>& sums, const float* a, const float* factors,
                                          const float* b, bool residual_a, bool residual_b) {
  using S = Accumulators<Tile>;
  constexpr int pitch_a = pitch_of<Tile, !TransposedA, Tile::rows>, pitch_b = pitch_of<Tile, TransposedB, Tile::cols>;
  const int row = S::first_row() + lane_index() / 4, column = S::first_column() + lane_index() / 4;
#pragma unroll 1
  for (int k0 = 0; k0 < Tile::depth; k0 += 16) {
    const int k = k0 + lane_index() % 4 * 2;
    unsigned tf32_a[S::down][2][4], residuals_a[S::down][4], rounded_a[S::down][4];
#pragma unroll
    for (int r = 0; r < S::down; ++r)
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // rows g and g + 8 of the first eight depths, then of the others
        const int line = row + 16 * r + i % 2 * 8, depth = k + i / 2 * 8;
        const Tf32Split split(two_depths<!TransposedA, pitch_a>(a, line, depth),
                              two_factors<TransposedA>(factors, line, depth));
        tf32_a[r][i / 2][i % 2] = split.tf32[0];
        tf32_a[r][i / 2][i % 2 + 2] = split.tf32[1];
        residuals_a[r][i] = split.residual;
        rounded_a[r][i] = tf32_to_bfloat16_pair(split.tf32[0], split.tf32[1]);
      }
#pragma unroll
    for (int c = 0; c < S::across; ++c) {
      const Tf32Split early(two_depths<TransposedB, pitch_b>(b, column + 8 * c, k));
      const Tf32Split late(two_depths<TransposedB, pitch_b>(b, column + 8 * c, k + 8));
      const unsigned rounded_b[2] = {tf32_to_bfloat16_pair(early.tf32[0], early.tf32[1]),
                                     tf32_to_bfloat16_pair(late.tf32[0], late.tf32[1])};
      const unsigned residuals_b[2] = {early.residual, late.residual};
#pragma unroll
      for (int r = 0; r < S::down; ++r) {
        // Tensor cores truncate sums, which over a thousand depths would be the largest error of all. So they sum
        // sixteen depths from zero, and a rounding addition adds those to the accumulator. This order of the four
        // instructions spills no registers.
        float part[4];
        mma_tf32(part, tf32_a[r][0], early.tf32, {0.0f, 0.0f, 0.0f, 0.0f});
        if (residual_a) mma_bfloat16(part, residuals_a[r], rounded_b, part);
        if (residual_b) mma_bfloat16(part, rounded_a[r], residuals_b, part);
        mma_tf32(part, tf32_a[r][1], late.tf32, part);
#pragma unroll
        for (int k = 0; k < 4; ++k) sums.value[r][c][k] += part[k];
      }
    }
  }
}

#else

// The same in float32, for GPUs whose tensor cores have neither TF32 nor bfloat16.
template <class Tile, bool TransposedA, bool TransposedB>
__device__ __forceinline__ void gemm_step(Accumulators<Tile>& sums, const float* a, const float* factors,
                                          const float* b, bool, bool) {
  using S = Accumulators<Tile>;
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

// For operands whose lines and factors are the same at all depths.
struct ConstantTables {
  __device__ __forceinline__ void lines(int, int) const {}
  __device__ __forceinline__ void factors(int, int) const {}
};

// sums += A * B over depths [begin, end), nearly as exact as float32 if `full_precision`, else in TF32. `tables` writes
// the offsets and factors of depths [k, k + depth) for a stage. On entry and on return, no thread is using the stages.
template <class Tile, bool TransposedA, bool TransposedB, class LinesA, class LinesB, class Tables>
__device__ __forceinline__ void gemm(Accumulators<Tile>& sums, const SharedMemory<Tile>& shared,
                                     const Operand<LinesA>& a, const Operand<LinesB>& b, int begin, int end,
                                     bool full_precision, const Tables& tables) {
  using TileA = OperandTile<Tile, TransposedA ? Tile::depth : Tile::rows, TransposedA ? Tile::rows : Tile::depth,
                            pitch_of<Tile, !TransposedA, Tile::rows>>;
  using TileB = OperandTile<Tile, TransposedB ? Tile::cols : Tile::depth, TransposedB ? Tile::depth : Tile::cols,
                            pitch_of<Tile, TransposedB, Tile::cols>>;
  const bool residual_a = full_precision && !a.exact, residual_b = full_precision && !b.exact;
  const auto load_stage = [&](int k, int stage) {
    const int line_a = LinesA::is_indexed ? 0 : TransposedA ? k : a.first_channel;
    const int line_b = LinesB::is_indexed ? 0 : TransposedB ? b.first_channel : k;
    TileA::load_tile(shared.a(stage), a.source, a.lines, stage, line_a, TransposedA ? a.first_channel : k,
                     TransposedA ? a.channel_limit : end);
    TileB::load_tile(shared.b(stage), b.source, b.lines, stage, line_b, TransposedB ? k : b.first_channel,
                     TransposedB ? end : b.channel_limit);
  };
  tables.lines(begin, 0);
  __syncthreads();
  load_stage(begin, 0);
  tables.factors(begin, 0);
  tables.lines(begin + Tile::depth, 1);
  wait_for_copies();
  __syncthreads();
  int stage = 0;
#pragma unroll 1
  for (int k = begin; k < end; k += Tile::depth) {
    // One barrier per step suffices: a step writes the other stage's tiles and factors, and the offsets for this
    // stage's next use.
    const int next = k + Tile::depth;
    if (next < end) {
      load_stage(next, stage ^ 1);
      tables.factors(next, stage ^ 1);
    }
    tables.lines(next + Tile::depth, stage);
    gemm_step<Tile, TransposedA, TransposedB>(sums, shared.a(stage),
                                              shared.factors() + (TransposedA ? stage * Tile::depth : 0),
                                              shared.b(stage), residual_a, residual_b);
    wait_for_copies();
    __syncthreads();
    stage ^= 1;
  }
}

}  // namespace orepa::cuda
