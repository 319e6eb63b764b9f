// What a kernel is told, by value: blocks and terms compact enough for 31 OREPA blocks in one launch's parameters.
#pragma once

#include <cstdint>

#include "../squeeze.h"

namespace orepa::cuda {

// `View` with 32-bit strides; offsets are computed in 64 bits.
struct DeviceView {
  unsigned char* data;
  std::int32_t row, column, tap;
  Type type;
};

struct DeviceTerm {
  DeviceView a, b, grad_a, grad_b;
  std::int64_t partials;  // where its partial sums lie in the workspace, in floats
  std::int32_t inner;
  std::int32_t items_a, items_b;  // thread blocks for grad_a and grad_b of a composed term; items_b: a separable one
  std::int32_t slot, slots;       // rows of the block's partial scale gradients
  std::int32_t counter;           // first counter
  std::int32_t splits;            // of the depth of grad_a
  std::int16_t scale;
  Kind kind;
  bool identity;
  std::uint8_t height, width, first_height, first_width;
};

struct DeviceBlock {
  DeviceView scales, grad_scales, kernel;
  std::int64_t scale_partials;  // [slot, O] in the workspace, in floats
  std::int32_t terms, first_term;
  std::int32_t first_item;
  std::int32_t out_channels, in_per_group, out_per_group, groups;
  std::int32_t height, width;
  std::int32_t tile_channels, tile_taps;  // rows of a tile: so many output channels, each with so many taps
  std::int32_t channel_tiles, tap_tiles;  // of one group
  std::int32_t elementwise_items;
  std::int32_t row_counter, row_arrivals;  // one counter per group and tile of output channels; 0 arrivals: unused
  std::int32_t shared_counter;             // shared filters: all of those tiles
};

struct TableHeader {
  float* workspace;
  std::int32_t* counters;
  std::int32_t blocks, first_term_byte;
  bool full;  // precision of products: float32's, else TF32's
};

// Blocks, then terms. 4 KB suits any single block and launches faster; more than that needs CUDA 12.1 and sm_70.
template <int Bytes>
struct Table : TableHeader {
  static constexpr int capacity = (Bytes - static_cast<int>(sizeof(TableHeader))) / 8 * 8;
  alignas(8) unsigned char bytes[capacity];
};

using SmallTable = Table<4088>;
using LargeTable = Table<32760>;

}  // namespace orepa::cuda
