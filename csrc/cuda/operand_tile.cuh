// Tiles of an operand, X lines of Y adjacent channels, loaded from global memory into shared memory as float32.
//
// A line is a row (o, p) of a kernel or an inner channel m. Both GEMM operands, rows x depth and depth x columns, are
// such tiles; `gemm` reads them straight or transposed.
#pragma once

#include "async_copy.cuh"
#include "tile.cuh"

namespace orepa::cuda {

// Memory layout of the channels of a line.
struct Source {
  const unsigned char* data;
  std::int32_t column;  // stride
  Type type;
  // A thread loads four aligned channels (quads), or one, with adjacent threads along channels or lines.
  enum Order { quads, channels, lines } order;

  // `count`: channels per line; `taps`: number of taps that are read.
  __device__ __forceinline__ Source(const DeviceView& view, int count, int taps)
      : data(view.data), column(view.column), type(view.type), order(channels) {
    const unsigned bytes = view.type == Type::float32 ? 15 : 7;
    const bool aligned = (reinterpret_cast<std::uintptr_t>(view.data) & bytes) == 0 && view.row % 4 == 0 &&
                         (view.tap % 4 == 0 || taps == 1) && count % 4 == 0;
    if (view.column == 1) {
      if (aligned) order = quads;
    } else if ((view.tap == 1 && taps > 1) || view.row == 1) {
      order = lines;
    }
  }
};

// Lines with their offsets in a table in shared memory, one table per stage or one for all.
struct IndexedLines {
  static constexpr bool is_indexed = true;
  const std::int64_t* offsets;
  int stage_size;
  __device__ __forceinline__ std::int64_t offset(int line, int stage) const {
    return offsets[stage * stage_size + line];
  }
};

// Lines at a constant stride: inner channels m.
struct StridedLines {
  static constexpr bool is_indexed = false;
  std::int64_t first;
  std::int32_t stride, limit;
  __device__ __forceinline__ std::int64_t offset(int line, int) const {
    return line < limit ? first + static_cast<std::int64_t>(line) * stride : -1;
  }
};

template <class Tile, int X, int Y, int Pitch>
struct OperandTile {
  static constexpr int quads = X * Y / (4 * Tile::threads), elements = X * Y / Tile::threads;  // per thread
  static_assert(quads * 4 * Tile::threads == X * Y && X % 8 == 0 && Y % 4 == 0 && Pitch % 4 == 0 && Pitch >= Y);

  // Load lines [first_line, first_line + X) and channels [first, first + Y); zeros for lines with a negative offset and
  // for channels from `limit` on. Complete after `wait_for_copies` and a barrier.
  template <class Lines>
  static __device__ __forceinline__ void load_tile(float* shared, const Source& source, const Lines& lines, int stage,
                                                   int first_line, int first, int limit) {
    if (source.order == Source::quads) {
#pragma unroll 1
      for (int i = 0; i < quads; ++i) {
        const int unit = i * Tile::threads + static_cast<int>(threadIdx.x);
        const int line = unit / (Y / 4), channel = unit % (Y / 4) * 4;
        const std::int64_t offset = lines.offset(first_line + line, stage);
        const bool inside = offset >= 0 && first + channel < limit;
        copy_quad(shared + line * Pitch + channel, source.data, inside ? offset + first + channel : -1, source.type);
      }
      return;
    }
#pragma unroll 1
    for (int i = 0; i < elements; ++i) {
      const int unit = i * Tile::threads + static_cast<int>(threadIdx.x);
      int line = unit / Y, channel = unit % Y;
      if (source.order == Source::lines) {  // a warp loads eight lines x four channels
        const int tile = unit / warp_size;
        line = tile % (X / 8) * 8 + unit % 8;
        channel = tile / (X / 8) * 4 + unit / 8 % 4;
      }
      const std::int64_t offset = lines.offset(first_line + line, stage);
      const bool inside = offset >= 0 && first + channel < limit;
      const std::int64_t column = static_cast<std::int64_t>(first + channel) * source.column;
      copy_element(shared + line * Pitch + channel, source.data, inside ? offset + column : -1, source.type);
    }
  }
};

}  // namespace orepa::cuda
