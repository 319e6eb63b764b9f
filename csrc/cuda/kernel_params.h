// Kernel parameters, passed by value: descriptions compact enough for 31 OREPA blocks in one launch.
#pragma once

#include <cstdint>

#include "../squeeze.h"

namespace orepa::cuda {

// Products of composed terms: in TF32, or in TF32 with two corrections, nearly as exact as in float32.
enum class Products { one = 1, three = 3 };

// `View` with 32-bit strides; offsets are computed in 64 bits.
struct DeviceView {
  unsigned char* data;
  std::int32_t row, column, tap;
  Type type;
};

// An item is the work of one thread block.
struct DeviceTerm {
  DeviceView a, b, grad_a, grad_b;
  std::int64_t partials;  // offset of the term's partial sums in the workspace, in floats
  std::int32_t inner;
  std::int32_t items_a, items_b;  // composed: items for grad_a and for grad_b; separable: items_b for both
  std::int32_t slot, slots;       // rows of the block's partial scale gradients
  std::int32_t counter;           // index of the first counter
  std::int32_t splits;            // of the depth of the product that is grad_a
  std::int16_t scale;
  Kind kind;
  bool identity;
  std::uint8_t height, width, first_height, first_width;
};

struct DeviceBlock {
  DeviceView scales, grad_scales, kernel;
  std::int64_t scale_partials;  // offset of [slot, O] in the workspace, in floats
  std::int32_t terms, first_term;
  std::int32_t first_item;
  std::int32_t out_channels, in_per_group, out_per_group, groups;
  std::int32_t height, width;
  std::int32_t tile_channels, tile_taps;  // rows of a tile: output channels x taps
  std::int32_t channel_tiles, tap_tiles;  // per group
  std::int32_t elementwise_items;
  std::int32_t row_counter, row_arrivals;  // a counter per tile of output channels of each group; 0 arrivals: unused
  std::int32_t shared_counter;             // over all those tiles, for shared filters
};

struct ParamsHeader {
  float* workspace;
  std::int32_t* counters;
  std::int32_t blocks, first_term_byte;
};

// Blocks, then terms. 4 KB hold any single block and launch faster; larger parameters need CUDA 12.1 and sm_70.
template <int Bytes>
struct KernelParams : ParamsHeader {
  static constexpr int capacity = (Bytes - static_cast<int>(sizeof(ParamsHeader))) / 8 * 8;
  alignas(8) unsigned char bytes[capacity];
};

using SmallParams = KernelParams<4088>;
using LargeParams = KernelParams<32760>;

}  // namespace orepa::cuda
