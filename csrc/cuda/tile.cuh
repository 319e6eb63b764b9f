// The two tile configurations, their shared memory, and how threads walk over a tile.
#pragma once

#include "elements.cuh"
#include "tile_shape.h"

namespace orepa::cuda {

constexpr int warp_size = 32;

constexpr int larger(int a, int b) {
  return a > b ? a : b;
}

// A thread block computes `rows` x `cols` sums of products, `depth` at a time; each warp `WarpRows` x `WarpCols` of
// them. Rows are (output channel, tap) pairs with the tap running fastest, or the internal channels of a composed term.
template <const TileShape& Shape, int WarpRows, int WarpCols, int BlocksPerSM>
struct TileConfig {
  static constexpr int rows = Shape.rows, cols = Shape.cols, depth = Shape.depth;
  static constexpr int warp_rows = WarpRows, warp_cols = WarpCols;
  static constexpr int warps_down = rows / WarpRows, warps_across = cols / WarpCols;
  static constexpr int warps = warps_down * warps_across, threads = warps * warp_size;
  static constexpr int blocks_per_sm = BlocksPerSM;

  // Patches of operands (see patch.cuh) as float32, lines padded so that a warp's fragments lie in 32 different banks.
  static constexpr int along_depth = depth + 8, across_depth = 4;  // pitch; padding
  static constexpr int a_bytes = 4 * larger(rows * along_depth, depth*(rows + across_depth));
  static constexpr int b_bytes = 4 * larger(cols * along_depth, depth*(cols + across_depth));
  static constexpr int stage_bytes = a_bytes + b_bytes;
  static constexpr int pitch = cols + 4;  // of the result tile: 4 * row + column hits all banks from either side
  static constexpr int result_bytes = 4 * rows * pitch;
  static constexpr int body_bytes = larger(2 * stage_bytes, result_bytes);
  static constexpr int offsets_bytes = 8 * larger(rows, 4 * depth), factors_bytes = 4 * rows, notes_bytes = 112,
                       sums_bytes = 4 * rows * warps;
  static constexpr int shared_bytes = body_bytes + offsets_bytes + factors_bytes + notes_bytes;

  static_assert(WarpRows % 16 == 0 && WarpCols % 8 == 0 && depth % 16 == 0, "mma.m16n8k16");
  static_assert(along_depth % 32 == 8 && (rows + across_depth) % 32 == 4 && (cols + across_depth) % 32 == 4, "banks");
  static_assert(rows % WarpRows == 0 && cols % WarpCols == 0);
  static_assert(2 * depth <= rows && depth <= threads, "factors");
  static_assert(threads == 4 * cols, "separable terms: four threads share a column");
  static_assert(rows * depth % (4 * threads) == 0 && cols * depth % (4 * threads) == 0, "whole quads for each thread");
  static_assert(result_bytes + sums_bytes <= body_bytes);
  static_assert(a_bytes % 16 == 0 && stage_bytes % 16 == 0 && body_bytes % 16 == 0);
  static_assert(shared_bytes <= 64 * 1024, "what sm_75 has");
};

// Two thread blocks share an SM that has 128 KB (sm_80, sm_90, sm_100). Tall tiles: operand traffic goes with 1 / cols
// + 1 / rows. Flat warps: the pieces of A, which wait in registers for those of B, are few.
using LargeTile = TileConfig<large_shape, 16, 64, 2>;
// Few channels: more thread blocks than large tiles would give, and less of each tile is empty.
using SmallTile = TileConfig<small_shape, 16, 32, 4>;

// The regions of a thread block's shared memory.
template <class Tile>
struct Shared {
  unsigned char* base;

  __device__ float* a(int stage) const { return reinterpret_cast<float*>(base + stage * Tile::stage_bytes); }
  __device__ float* b(int stage) const {
    return reinterpret_cast<float*>(base + stage * Tile::stage_bytes + Tile::a_bytes);
  }
  // [rows, pitch]; shares memory with the stages
  __device__ float* result() const { return reinterpret_cast<float*>(base); }
  // Where the lines of operands begin, -1 for a line of zeros: the rows of A, or the depths of both operands in each
  // stage
  __device__ std::int64_t* offsets() const { return reinterpret_cast<std::int64_t*>(base + Tile::body_bytes); }
  // What the lines of A are multiplied by, likewise
  __device__ float* factors() const { return reinterpret_cast<float*>(base + Tile::body_bytes + Tile::offsets_bytes); }
  __device__ int* flag() const {
    return reinterpret_cast<int*>(base + Tile::body_bytes + Tile::offsets_bytes + Tile::factors_bytes);
  }
  // Whatever a thread block wants to remember without registers
  __device__ int* notes() const { return flag() + 1; }
  __device__ void* long_notes() const { return flag() + 4; }
  // [warps, rows], behind the result
  __device__ float* sums() const { return reinterpret_cast<float*>(base + Tile::result_bytes); }
};

__device__ __forceinline__ int warp_index() {
  return static_cast<int>(threadIdx.x) / warp_size;
}
__device__ __forceinline__ int lane_index() {
  return static_cast<int>(threadIdx.x) % warp_size;
}

// Which part of a block's kernel a tile is.
struct Place {
  int group;
  int first_channel, channels;  // output channels, counted over all groups
  int first_tap, taps;
  int first_column, columns;  // input channels of the group
};

// Whether memory runs along taps first, as in contiguous tensors, and not along channels, as in channels_last ones.
__device__ __forceinline__ bool taps_first(const DeviceView& view) {
  return view.column != 1 && view.tap == 1;
}

// All (column, tap) of one output channel, by the lanes of a warp in the order of memory: `visit(column, tap)`.
template <int Unroll = 4, class Visit>
__device__ __forceinline__ void walk(int columns, int taps, bool along_taps, const Visit& visit) {
  const int inner = along_taps ? taps : columns;
  const Divider divider(inner);
  const int count = columns * taps;
#pragma unroll Unroll
  for (int index = lane_index(); index < count; index += warp_size) {
    const int outer = divider.quotient(index), rest = index - outer * inner;
    visit(along_taps ? outer : rest, along_taps ? rest : outer);
  }
}

// The taps of a smaller kernel, centred in the block's.
class Window {
 public:
  __device__ __forceinline__ Window(const DeviceBlock& block, int height, int width)
      : top_((block.height - height) / 2),
        left_((block.width - width) / 2),
        block_width_(block.width),
        whole_(block.height == height && block.width == width),
        width_(width) {}
  // The block's tap where tap `tap` of the smaller kernel lies.
  __device__ __forceinline__ int tap(int tap) const {
    if (whole_) return tap;
    const int h = width_.quotient(tap);
    return (h + top_) * block_width_ + width_.remainder(tap) + left_;
  }
  // The row of that tap in a tile, counted from the channel's first row; -1: it is in another tile.
  __device__ __forceinline__ int row(int small_tap, const Place& place) const {
    const int row = tap(small_tap) - place.first_tap;
    return static_cast<unsigned>(row) < static_cast<unsigned>(place.taps) ? row : -1;
  }

 private:
  int top_, left_, block_width_;
  bool whole_;
  Divider width_;
};

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int step = warp_size / 2; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

// The thread block's part of a launch: its block, by binary search over their first items.
template <class Table>
__device__ __forceinline__ const DeviceBlock& find_block(const Table& table, int item) {
  const DeviceBlock* blocks = reinterpret_cast<const DeviceBlock*>(table.bytes);
  int low = 0, high = table.blocks;
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

template <class Table>
__device__ __forceinline__ const DeviceTerm* terms_of(const Table& table, const DeviceBlock& block) {
  return reinterpret_cast<const DeviceTerm*>(table.bytes + table.first_term_byte) + block.first_term;
}

// s_b[o], one where the branch has no scaling
__device__ __forceinline__ float scale_of(const DeviceBlock& block, const DeviceTerm& term, int channel) {
  return term.scale < 0 ? 1.0f : load(block.scales, term.scale, channel, 0);
}

}  // namespace orepa::cuda
