// Tile sizes, shared by the kernels and the host code that counts thread blocks.
#pragma once

namespace orepa::cuda {

// rows x cols results per thread block, and the depth of one step of products.
struct TileShape {
  int rows, cols, depth;
};

constexpr TileShape large_shape{128, 64, 32}, small_shape{64, 32, 32};

// A tile holds all taps of at least one output channel in the backward pass.
constexpr int max_taps = large_shape.rows;

// Tiles of output channels per thread block, which sums depthwise gradients over them.
constexpr int separable_span = 4;
// Expanded channels e per pass of a separable term.
constexpr int separable_expand = 8;

#ifdef __CUDACC__
__host__ __device__
#endif
    constexpr int ceil_div(int value, int divisor) {
  return (value + divisor - 1) / divisor;
}

}  // namespace orepa::cuda
