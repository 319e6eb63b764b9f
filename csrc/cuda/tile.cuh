// The two tile configurations, their shared memory, and loops over a tile's elements.
#pragma once

#include "elements.cuh"
#include "tile_shape.h"

namespace orepa::cuda {

constexpr int warp_size = 32;

constexpr int larger(int a, int b) {
  return a > b ? a : b;
}

// A thread block computes `rows` x `cols` sums of products, `depth` at a time; each warp computes `WarpRows` x
// `WarpCols` of them. Rows are (output channel, tap) pairs, tap innermost, or the inner channels of a composed term.
template <const TileShape& Shape, int WarpRows, int WarpCols, int BlocksPerSM>
struct TileConfig {
  static constexpr int rows = Shape.rows, cols = Shape.cols, depth = Shape.depth;
  static constexpr int warp_rows = WarpRows, warp_cols = WarpCols;
  static constexpr int warps_down = rows / WarpRows, warps_across = cols / WarpCols;
  static constexpr int warps = warps_down * warps_across, threads = warps * warp_size;
  static constexpr int blocks_per_sm = BlocksPerSM;

  // Operand tiles (operand_tile.cuh) in float32. Their pitches put what a warp loads at once into different banks:
  // eight rows (or columns) at four depths of tiles along the depth, or sixteen rows at four depths of tiles across.
  static constexpr int along_depth = depth + 4, across_padding = 8;
  static constexpr int a_bytes = 4 * larger(rows * along_depth, depth*(rows + across_padding));
  static constexpr int b_bytes = 4 * larger(cols * along_depth, depth*(cols + across_padding));
  static constexpr int stage_bytes = a_bytes + b_bytes;
  static constexpr int pitch = cols + 4;  // of results: no bank conflicts along rows or columns
  static constexpr int result_bytes = 4 * rows * pitch;
  static constexpr int body_bytes = larger(2 * stage_bytes, result_bytes);
  static constexpr int offsets_bytes = 8 * larger(rows, 4 * depth), factors_bytes = 4 * rows, scratch_bytes = 112,
                       operands_bytes = 128, sums_bytes = 4 * rows * warps;
  static constexpr int shared_bytes = body_bytes + offsets_bytes + factors_bytes + scratch_bytes + operands_bytes;

  static_assert(WarpRows % 16 == 0 && WarpCols % 8 == 0 && depth % 16 == 0, "mma.m16n8k16");
  static_assert(rows % WarpRows == 0 && cols % WarpCols == 0);
  static_assert(2 * depth <= rows && depth <= threads, "factors");
  static_assert(threads == 4 * cols, "separable terms: four threads per column");
  static_assert(rows * depth % (4 * threads) == 0 && cols * depth % (4 * threads) == 0,
                "each thread copies entire quads");
  static_assert(result_bytes + sums_bytes <= body_bytes);
  static_assert(a_bytes % 16 == 0 && stage_bytes % 16 == 0 && body_bytes % 16 == 0);
  static_assert(shared_bytes <= 64 * 1024, "what sm_75 has");
};

// Two thread blocks fit on an SM with 128 KB of shared memory (sm_80, sm_90, sm_100). Tall tiles, as operand traffic is
// proportional to 1 / cols + 1 / rows. Square warps, as each warp converts the operands that it multiplies.
using LargeTile = TileConfig<large_shape, 32, 32, 2>;
// For few channels: more thread blocks, and less of each tile is empty.
using SmallTile = TileConfig<small_shape, 32, 16, 4>;

// Layout of a thread block's shared memory.
template <class Tile>
struct SharedMemory {
  unsigned char* base;

  __device__ float* a(int stage) const { return reinterpret_cast<float*>(base + stage * Tile::stage_bytes); }
  __device__ float* b(int stage) const {
    return reinterpret_cast<float*>(base + stage * Tile::stage_bytes + Tile::a_bytes);
  }
  // [rows, pitch]; aliases the stages
  __device__ float* result() const { return reinterpret_cast<float*>(base); }
  // Offsets of lines, -1 for a line of zeros: the rows of A, or per stage the depths of both operands
  __device__ std::int64_t* offsets() const { return reinterpret_cast<std::int64_t*>(base + Tile::body_bytes); }
  // Factors of the same lines of A
  __device__ float* factors() const { return reinterpret_cast<float*>(base + Tile::body_bytes + Tile::offsets_bytes); }
  __device__ int* flag() const {
    return reinterpret_cast<int*>(base + Tile::body_bytes + Tile::offsets_bytes + Tile::factors_bytes);
  }
  // Values that a thread block stores here to free registers: three int, a struct of each role, and operands of
  // products
  __device__ int* scratch() const { return flag() + 1; }
  __device__ void* saved() const { return flag() + 4; }
  __device__ void* operands() const { return reinterpret_cast<unsigned char*>(flag()) + Tile::scratch_bytes; }
  // [warps, rows], after the result
  __device__ float* sums() const { return reinterpret_cast<float*>(base + Tile::result_bytes); }
};

// threadIdx.x, read again: what is computed from it is not kept in registers over a loop.
__device__ __forceinline__ int thread_index() {
#ifdef OREPA_EMULATED
  return static_cast<int>(threadIdx.x);
#else
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
#endif
}
__device__ __forceinline__ int warp_index() {
  return static_cast<int>(threadIdx.x) / warp_size;
}
__device__ __forceinline__ int lane_index() {
  return static_cast<int>(threadIdx.x) % warp_size;
}

// The part of a block's kernel that a tile covers.
struct Region {
  int group;
  int first_channel, channels;  // output channels, numbered over all groups
  int first_tap, taps;
  int first_column, columns;  // input channels of the group
};

// The taps of a term's kernel, centred in the block's.
class Window {
 public:
  __device__ __forceinline__ Window(const DeviceBlock& block, int height, int width)
      : top_((block.height - height) / 2),
        left_((block.width - width) / 2),
        block_width_(block.width),
        same_size_(block.height == height && block.width == width),
        width_(width) {}
  // The block's tap at the term's tap `tap`.
  __device__ __forceinline__ int tap(int tap) const {
    if (same_size_) return tap;
    const int h = width_.quotient(tap);
    return (h + top_) * block_width_ + width_.remainder(tap) + left_;
  }
  // That tap's row in a tile, relative to the channel's first row; -1 if it is in another tile.
  __device__ __forceinline__ int row(int term_tap, const Region& region) const {
    const int row = tap(term_tap) - region.first_tap;
    return static_cast<unsigned>(row) < static_cast<unsigned>(region.taps) ? row : -1;
  }

 private:
  int top_, left_, block_width_;
  bool same_size_;
  FastDivider width_;
};

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int step = warp_size / 2; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

template <class Params>
__device__ __forceinline__ const DeviceBlock* blocks_of(const Params& params) {
  return reinterpret_cast<const DeviceBlock*>(params.bytes);
}

// Return the block that an item belongs to, by binary search over first items.
template <class Params>
__device__ __forceinline__ const DeviceBlock& find_block(const Params& params, int item) {
  const DeviceBlock* blocks = blocks_of(params);
  int low = 0, high = params.blocks;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (blocks[middle].first_item <= item) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return blocks[low];
}

template <class Params>
__device__ __forceinline__ const DeviceTerm* terms_of(const Params& params, const DeviceBlock& block) {
  return reinterpret_cast<const DeviceTerm*>(params.bytes + params.first_term_byte) + block.first_term;
}

// s_b[o], or one if the branch has no scaling
__device__ __forceinline__ float scale_of(const DeviceBlock& block, const DeviceTerm& term, int channel) {
  return term.scale < 0 ? 1.0f : load(block.scales, term.scale, channel, 0);
}

}  // namespace orepa::cuda
