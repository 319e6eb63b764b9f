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

// One operand of a product: its lines are rows (or columns) of the tile and its channels the depth, or vice versa.
template <class Lines>
struct Operand {
  Source source;
  Lines lines;
  int first, limit;  // line, if channels are the depth; else channels
};

// `Size` rows (or columns) at `Tile::depth` depths, of which one or the other (`Along`) are the channels.
template <class Tile, int Size, bool Along>
struct OperandTile {
  static constexpr int X = Along ? Size : Tile::depth, Y = Along ? Tile::depth : Size;  // lines, channels
  static constexpr int pitch = Along ? Tile::along_depth : Size + Tile::across_padding;
  static constexpr int quads = X * Y / (4 * Tile::threads), elements = X * Y / Tile::threads;  // per thread
  static constexpr int across = Y / 4, down = Tile::threads / across;
  static_assert(quads * 4 * Tile::threads == X * Y && X % 8 == 0 && Y % 32 == 0);

  static __device__ __forceinline__ float* place(float* shared, int line, int channel) {
    return shared + line * pitch + channel;
  }

  // Start to load depths from `k` on; zeros for lines with a negative offset and for channels behind the last. Complete
  // after `finish`, `wait_for_copies` and a barrier.
  template <class Lines>
  __device__ __forceinline__ void start(float* shared, const Operand<Lines>& operand, int stage, int k, int end) {
    const Source& source = operand.source;
    const int thread = thread_index();
    const int first = Along ? k : operand.first, limit = Along ? end : operand.limit;  // of channels
    const int first_line = Lines::is_indexed ? 0 : Along ? operand.first : k;
    if (source.order == Source::quads) {
      const int line = thread / across, channel = thread % across * 4;
      const bool exists = first + channel < limit;
      std::int64_t offset[quads];
#pragma unroll
      for (int i = 0; i < quads; ++i) offset[i] = operand.lines.offset(first_line + line + i * down, stage);
      if (source.type == Type::float32) {
        const float* data = reinterpret_cast<const float*>(source.data);
#pragma unroll
        for (int i = 0; i < quads; ++i) {
          const bool inside = offset[i] >= 0 && exists;
          copy_async<16>(place(shared, line + i * down, channel), inside ? data + offset[i] + first + channel : data,
                         inside);
        }
      } else {
        const Bits16* data = reinterpret_cast<const Bits16*>(source.data) + (first + channel);
#pragma unroll
        for (int i = 0; i < quads; ++i)
          half_[i] =
              offset[i] >= 0 && exists ? __ldg(reinterpret_cast<const uint2*>(data + offset[i])) : make_uint2(0, 0);
      }
      return;
    }
#pragma unroll 1
    for (int i = 0; i < elements; ++i) {
      const int unit = i * Tile::threads + thread;
      int line = unit / Y, channel = unit % Y;
      if (source.order == Source::lines) {  // a warp loads eight lines x four channels
        const int tile = unit / warp_size;
        line = tile % (X / 8) * 8 + unit % 8;
        channel = tile / (X / 8) * 4 + unit / 8 % 4;
      }
      const std::int64_t offset = operand.lines.offset(first_line + line, stage);
      const bool inside = offset >= 0 && first + channel < limit;
      const std::int64_t column = static_cast<std::int64_t>(first + channel) * source.column;
      copy_element(place(shared, line, channel), source.data, inside ? offset + column : -1, source.type);
    }
  }

  // Write what `start` has loaded into registers: 16-bit elements, which asynchronous copies could not widen.
  __device__ __forceinline__ void finish(float* shared, const Source& source) const {
    if (source.order != Source::quads || source.type == Type::float32) return;
    const int thread = thread_index(), line = thread / across, channel = thread % across * 4;
    const auto write = [&](Type type) {
#pragma unroll
      for (int i = 0; i < quads; ++i)
        *reinterpret_cast<float4*>(place(shared, line + i * down, channel)) =
            make_float4(widen(half_[i].x & 0xffffu, type), widen(half_[i].x >> 16, type),
                        widen(half_[i].y & 0xffffu, type), widen(half_[i].y >> 16, type));
    };
    source.type == Type::bfloat16 ? write(Type::bfloat16) : write(Type::float16);
  }

 private:
  uint2 half_[quads];
};

}  // namespace orepa::cuda
