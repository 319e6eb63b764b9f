// Matrix products of one tile: of the composition W2 o W1 (paper Eq. 3) and of its two gradients.
#pragma once

#include "mma.cuh"
#include "operand_tile.cuh"

namespace orepa::cuda {

// Which operand is M and which is N of the matrix instructions, M x depth and depth x N, and whether depths are
// adjacent in its shared memory, or else its lines.
template <class Tile, bool RowsAreM, bool AlongM, bool AlongN>
struct Sides {
  static constexpr bool rows_are_m = RowsAreM, along_m = AlongM, along_n = AlongN;
  static constexpr int depth = Tile::depth;
  static constexpr int tiles_m = (RowsAreM ? Tile::warp_rows : Tile::warp_cols) / 16;
  static constexpr int tiles_n = (RowsAreM ? Tile::warp_cols : Tile::warp_rows) / 8;
  static constexpr int pitch_m =
      AlongM ? Tile::along_depth : (RowsAreM ? Tile::rows : Tile::cols) + Tile::across_padding;
  static constexpr int pitch_n =
      AlongN ? Tile::along_depth : (RowsAreM ? Tile::cols : Tile::rows) + Tile::across_padding;

  static __device__ __forceinline__ int first_row() { return warp_index() / Tile::warps_across * Tile::warp_rows; }
  static __device__ __forceinline__ int first_column() { return warp_index() % Tile::warps_across * Tile::warp_cols; }
  static __device__ __forceinline__ int first_m() { return RowsAreM ? first_row() : first_column(); }
  static __device__ __forceinline__ int first_n() { return RowsAreM ? first_column() : first_row(); }
  // The two lines that this lane has of a fragment's 16 of M or, in its results, of 8 of N. The first may be in any
  // order: this one allows wide loads.
  static __device__ __forceinline__ int line_m(int tile, int i) {
    const int group = lane_index() / 4;
    return first_m() + 16 * tile + (AlongM ? group + 8 * i : 2 * group + i);
  }
  static __device__ __forceinline__ int line_n(int tile, int i) {
    return first_n() + 8 * tile + lane_index() % 4 * 2 + i;
  }
};

// The accumulators of one thread, in the layout of C fragments, with or without tensor cores.
template <class Sides>
struct Accumulators {
  float value[Sides::tiles_m][Sides::tiles_n][4];

  __device__ __forceinline__ Accumulators() {
#pragma unroll
    for (int m = 0; m < Sides::tiles_m; ++m)
#pragma unroll
      for (int n = 0; n < Sides::tiles_n; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) value[m][n][i] = 0.0f;
  }

  __device__ __forceinline__ void write(float* result, int pitch) const {
#pragma unroll
    for (int m = 0; m < Sides::tiles_m; ++m)
#pragma unroll
      for (int n = 0; n < Sides::tiles_n; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int line_m = Sides::line_m(m, i / 2), line_n = Sides::line_n(n, i % 2);
          result[Sides::rows_are_m ? line_m * pitch + line_n : line_n * pitch + line_m] = value[m][n][i];
        }
  }
};

// Factors of the elements of N: none, one per line, or one per depth.
enum class Factors { none, lines, depths };

#if OREPA_MMA

// Load what a lane multiplies at 16 depths from `k` on, as float32: depths c and c + 4 in `[0]`, c + 8 and c + 12 in
// `[1]` for c = lane % 4, in the order of a TF32 fragment of M.
template <class Sides>
__device__ __forceinline__ void load_m(float (&value)[2][4], const float* tile, int m, int k) {
  const int lane = lane_index(), c = lane % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if constexpr (Sides::along_m) {
      const int line = Sides::first_m() + 16 * m + lane % 16;
      load_matrices(value[half], tile + line * Sides::pitch_m + lane / 16 * 4 + k + 8 * half);
    } else {
      const float* from = tile + c * Sides::pitch_m + Sides::line_m(m, 0);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float2 two = *reinterpret_cast<const float2*>(from + (k + 8 * half + 4 * i) * Sides::pitch_m);
        value[half][2 * i] = two.x;
        value[half][2 * i + 1] = two.y;
      }
    }
  }
}

// The same of N.
template <class Sides, Factors Scaled>
__device__ __forceinline__ void load_n(float (&value)[2][2], const float* tile, const float* factors, int n, int k) {
  const int lane = lane_index(), c = lane % 4, first = Sides::first_n() + 8 * n;
  float four[4];
  if constexpr (Sides::along_n) {
    load_matrices(four, tile + (first + lane % 8) * Sides::pitch_n + lane / 8 * 4 + k);
  } else {
    const float* from = tile + c * Sides::pitch_n + first + lane / 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) four[i] = from[(k + 4 * i) * Sides::pitch_n];
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (Scaled == Factors::lines) four[i] *= factors[first + lane / 4];
    if constexpr (Scaled == Factors::depths) four[i] *= factors[k + 4 * i + c];
    value[i / 2][i % 2] = four[i];
  }
}

// Values as TF32 and, for three products, the rest in bfloat16:
//   a * b = tf32(a) * tf32(b) + rest(a) * b + a * rest(b),
// the last two in bfloat16 at half the cost of the first each; the relative error is near 2^-20. Three bfloat16
// products would cost a quarter less, but their error is 2^-18. TF32 truncated to bfloat16, not rounded, would double
// it.
template <Products P, int Count>
struct Converted {
  static constexpr int lines = Count / 2;  // of which the values are: a register of bfloat16 has two depths of one line
  unsigned tf32[2][Count], rest[Count], rounded[Count];

  __device__ __forceinline__ void set(const float (&value)[2][Count]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < Count; ++i) tf32[half][i] = to_tf32(value[half][i]);
      if constexpr (P == Products::three) {
#pragma unroll
        for (int i = 0; i < Count; ++i) tf32[half][i] &= 0xffffe000u;
#pragma unroll
        for (int i = 0; i < lines; ++i) {
          const float first = __uint_as_float(tf32[half][i]), second = __uint_as_float(tf32[half][i + lines]);
          rest[half * lines + i] = to_bfloat16_pair(value[half][i] - first, value[half][i + lines] - second);
          rounded[half * lines + i] = to_bfloat16_pair(first, second);
        }
      }
    }
  }
};

// sums += M * N over one step of depth, both operands in shared memory. Depths c, c + 4, c + 8 and c + 12 of 16 also
// stand for 2c, 2c + 1, 2c + 8 and 2c + 9 of a bfloat16 fragment: depths may be permuted, if M and N agree.
template <class Sides, Products P, Factors Scaled>
__device__ __forceinline__ void gemm_step(Accumulators<Sides>& sums, const float* tile_m, const float* tile_n,
                                          const float* factors) {
#pragma unroll 1
  for (int k = 0; k < Sides::depth; k += 16) {
    Converted<P, 4> m[Sides::tiles_m];
#pragma unroll
    for (int i = 0; i < Sides::tiles_m; ++i) {
      float value[2][4];
      load_m<Sides>(value, tile_m, i, k);
      m[i].set(value);
    }
#pragma unroll
    for (int j = 0; j < Sides::tiles_n; ++j) {
      float value[2][2];
      load_n<Sides, Scaled>(value, tile_n, factors, j, k);
      Converted<P, 2> n;
      n.set(value);
#pragma unroll
      for (int i = 0; i < Sides::tiles_m; ++i) {
        float (&sum)[4] = sums.value[i][j];
        if constexpr (P == Products::one) {
          mma_tf32(sum, m[i].tf32[0], n.tf32[0], sum);
          mma_tf32(sum, m[i].tf32[1], n.tf32[1], sum);
        } else {
          // Tensor cores truncate sums, which over a thousand depths would be the largest error of all. So they sum
          // sixteen depths from zero, and a rounding addition adds those to the accumulator.
          float part[4];
          mma_tf32(part, m[i].tf32[0], n.tf32[0], {0.0f, 0.0f, 0.0f, 0.0f});
          mma_bfloat16(part, m[i].rest, n.rounded, part);
          mma_bfloat16(part, m[i].rounded, n.rest, part);
          mma_tf32(part, m[i].tf32[1], n.tf32[1], part);
#pragma unroll
          for (int v = 0; v < 4; ++v) sum[v] += part[v];
        }
      }
    }
  }
}

#else

// The same in float32, for GPUs whose tensor cores have neither TF32 nor bfloat16.
template <class Sides, Products, Factors Scaled>
__device__ __forceinline__ void gemm_step(Accumulators<Sides>& sums, const float* tile_m, const float* tile_n,
                                          const float* factors) {
#pragma unroll 2
  for (int k = 0; k < Sides::depth; ++k) {
    const auto load_one = [&](const float* tile, bool along, int pitch, int line) {
      return along ? tile[line * pitch + k] : tile[k * pitch + line];
    };
    float m[2 * Sides::tiles_m], n[2 * Sides::tiles_n];
#pragma unroll
    for (int i = 0; i < 2 * Sides::tiles_m; ++i)
      m[i] = load_one(tile_m, Sides::along_m, Sides::pitch_m, Sides::line_m(i / 2, i % 2));
#pragma unroll
    for (int j = 0; j < 2 * Sides::tiles_n; ++j) {
      const int line = Sides::line_n(j / 2, j % 2);
      n[j] = load_one(tile_n, Sides::along_n, Sides::pitch_n, line);
      if constexpr (Scaled != Factors::none) n[j] *= factors[Scaled == Factors::lines ? line : k];
    }
#pragma unroll
    for (int i = 0; i < 2 * Sides::tiles_m; ++i)
#pragma unroll
      for (int j = 0; j < 2 * Sides::tiles_n; ++j) sums.value[i / 2][j / 2][i % 2 * 2 + j % 2] += m[i] * n[j];
  }
}

#endif

// For operands whose lines and factors are the same at all depths.
struct ConstantTables {
  __device__ __forceinline__ void lines(int, int) const {}
  __device__ __forceinline__ void factors(int, int) const {}
};

// sums += rows * columns over depths [begin, end). `tables` writes the offsets and factors of depths [k, k + depth) for
// a stage. On entry and on return, no thread is using the stages.
template <Products P, Factors Scaled, class Sides, class Tile, class RowLines, class ColumnLines, class Tables>
__device__ __forceinline__ void gemm(Accumulators<Sides>& sums, const SharedMemory<Tile>& shared,
                                     const Operand<RowLines>& rows, const Operand<ColumnLines>& columns, int begin,
                                     int end, const Tables& tables) {
  OperandTile<Tile, Tile::rows, Sides::rows_are_m ? Sides::along_m : Sides::along_n> row_tile;
  OperandTile<Tile, Tile::cols, Sides::rows_are_m ? Sides::along_n : Sides::along_m> column_tile;
  // In shared memory to free registers.
  struct Operands {
    Operand<RowLines> rows;
    Operand<ColumnLines> columns;
    int end;
  };
  static_assert(sizeof(Operands) <= Tile::operands_bytes);
  Operands& operands = *static_cast<Operands*>(shared.operands());
  const auto start = [&](int k, int stage) {
    row_tile.start(shared.a(stage), operands.rows, stage, k, operands.end);
    column_tile.start(shared.b(stage), operands.columns, stage, k, operands.end);
  };
  const auto finish = [&](int stage) {
    row_tile.finish(shared.a(stage), operands.rows.source);
    column_tile.finish(shared.b(stage), operands.columns.source);
  };
  if (threadIdx.x == 0) operands = {rows, columns, end};
  tables.lines(begin, 0);
  __syncthreads();
  start(begin, 0);
  tables.factors(begin, 0);
  tables.lines(begin + Tile::depth, 1);
  finish(0);
  wait_for_copies();
  __syncthreads();
  int stage = 0;
#pragma unroll 1
  for (int k = begin; k < operands.end; k += Tile::depth) {
    // One barrier per step suffices: a step writes the other stage's tiles and factors, and the offsets for this
    // stage's next use.
    const int next = k + Tile::depth;
    const bool more = next < operands.end;
    if (more) {
      start(next, stage ^ 1);
      tables.factors(next, stage ^ 1);
    }
    tables.lines(next + Tile::depth, stage);
    // Three products leave no registers for elements that are on their way.
    if (P == Products::three && more) finish(stage ^ 1);
    const float *a = shared.a(stage), *b = shared.b(stage);
    gemm_step<Sides, P, Scaled>(sums, Sides::rows_are_m ? a : b, Sides::rows_are_m ? b : a,
                                shared.factors() + (Scaled == Factors::depths ? stage * Tile::depth : 0));
    if (P == Products::one && more) finish(stage ^ 1);
    wait_for_copies();
    __syncthreads();
    stage ^= 1;
  }
}

}  // namespace orepa::cuda
