// Forward: a thread block computes one tile of W from all terms, and writes it once.
#include "forward_terms.cuh"
#include "gemm.cuh"
#include "launch.cuh"
#include "schedule.h"

namespace orepa::cuda {
namespace {

// Add b o a (paper Eq. 3): rows (o, p), columns i, and per tap r of a a depth of inner channels m:
//   sums[(o,p), i] += s[o] * b[o, m, p - r] * a[m, i, r]
template <Products P, class Sides, class Tile, class Params>
__device__ __forceinline__ void add_composed(Accumulators<Sides>& sums, const SharedMemory<Tile>& shared,
                                             const Params& params, int t, const Region& region) {
#pragma unroll 1
  for (int r = 0;; ++r) {
    // Inside the loop, although the same in all its turns, because registers limit `gemm`.
    const DeviceBlock& block = blocks_of(params)[shared.scratch()[0]];
    const DeviceTerm& term = terms_of(params, block)[t];
    if (r == term.first_height * term.first_width) break;
    const int b_height = term.height - term.first_height + 1, b_width = term.width - term.first_width + 1;
    const int top = (block.height - term.height) / 2, left = (block.width - term.width) / 2;
    const FastDivider tile_taps(region.taps), width(block.width);
    const Source source_a(term.a, block.in_per_group, term.first_height * term.first_width);
    const Source source_b(term.b, term.inner, b_height * b_width);
    const int r_h = r / term.first_width, r_w = r - r_h * term.first_width;
    bool any_inside = false;
    for (int row = static_cast<int>(threadIdx.x); row < Tile::rows; row += Tile::threads) {
      const int c = tile_taps.quotient(row), tap = region.first_tap + row - c * region.taps;
      const int h = width.quotient(tap) - top - r_h, w = width.remainder(tap) - left - r_w;
      const int channel = region.first_channel + c;
      const bool inside = c < region.channels && h >= 0 && h < b_height && w >= 0 && w < b_width;
      shared.offsets()[row] = inside ? at(term.b, channel, 0, h * b_width + w) : -1;
      shared.factors()[row] = inside ? scale_of(block, term, channel) : 0.0f;
      any_inside |= inside;
    }
    if (!__syncthreads_or(any_inside)) continue;
    const Operand<IndexedLines> b{source_b, {shared.offsets(), 0}, 0, 0};
    const Operand<StridedLines> a{source_a,
                                  {at(term.a, region.group * term.inner, 0, r), term.a.row, term.inner},
                                  region.first_column,
                                  block.in_per_group};
    gemm<P, Factors::lines>(sums, shared, b, a, 0, term.inner, ConstantTables{});
  }
}

template <class Tile>
__device__ __forceinline__ Region region_of(const DeviceBlock& block, int item) {
  const int column_tiles = ceil_div(block.in_per_group, Tile::cols);
  const int column_tile = item % column_tiles;
  item /= column_tiles;
  const int tap_tile = item % block.tap_tiles;
  item /= block.tap_tiles;
  const int channel_tile = item % block.channel_tiles, group = item / block.channel_tiles;
  Region region;
  region.group = group;
  region.first_channel = group * block.out_per_group + channel_tile * block.tile_channels;
  region.channels = min(block.tile_channels, block.out_per_group - channel_tile * block.tile_channels);
  region.first_tap = tap_tile * block.tile_taps;
  region.taps = block.tile_taps;
  region.first_column = column_tile * Tile::cols;
  region.columns = min(Tile::cols, block.in_per_group - region.first_column);
  return region;
}

template <class Tile, class Params, Products P>
__global__ void __launch_bounds__(Tile::threads, Tile::blocks_per_sm) squeeze(const __grid_constant__ Params params) {
  const SharedMemory<Tile> shared{shared_memory()};
  const DeviceBlock& block = find_block(params, static_cast<int>(blockIdx.x));
  const DeviceTerm* terms = terms_of(params, block);
  Region& saved_region = *static_cast<Region*>(shared.saved());
  if (threadIdx.x == 0) {
    saved_region = region_of<Tile>(block, static_cast<int>(blockIdx.x) - block.first_item);
    shared.scratch()[0] = static_cast<int>(&block - blocks_of(params));
  }
  __syncthreads();
  {
    Accumulators<Sides<Tile, false, false, true>> sums;
    for (int t = 0; t < blocks_of(params)[shared.scratch()[0]].terms; ++t)
      if (terms_of(params, blocks_of(params)[shared.scratch()[0]])[t].kind == Kind::composed)
        add_composed<P>(sums, shared, params, t, saved_region);
    sums.write(shared.result(), Tile::pitch);
  }
  __syncthreads();

  const Region region = saved_region;
  for (int t = 0; t < block.terms; ++t) {
    if (terms[t].kind != Kind::separable || terms[t].b.data == nullptr) continue;
    add_separable<Tile>(shared.result(), block, terms[t], region);
    __syncthreads();
  }

  for (int c = warp_index(); c < region.channels; c += Tile::warps) {
    const int channel = region.first_channel + c;
    float* rows = shared.result() + c * region.taps * Tile::pitch;
    for (int t = 0; t < block.terms; ++t) {
      add_term<Tile>(rows, block, terms[t], region, channel);
      __syncwarp();
    }
    write_elements(
        block.kernel, at(block.kernel, channel, region.first_column, region.first_tap), region.columns, region.taps,
        [&](int column, int tap, auto value) { return as<decltype(value)>(rows + tap * Tile::pitch + column); });
  }
}

struct Squeeze {
  template <class Tile, class Params, Products P>
  static constexpr auto kernel = squeeze<Tile, Params, P>;
};

}  // namespace

void forward(const Block* blocks, int count, const Context& context) {
  const DeviceGuard guard(context.device);
  for (const Schedule& launch : schedule(blocks, count, false)) launch_schedule<Squeeze>(launch, context);
}

std::string unusable_reason(int device) {
  int driver = 0, runtime = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  const auto version = [](int number) {
    return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
  };
  const std::string versions =
      "the driver supports CUDA " + version(driver) + ", and the kernels were built with " + version(runtime);
  if (driver / 1000 < runtime / 1000) return versions;  // within a major version, any driver will do
  if (device < 0) return "";
  try {
    const DeviceGuard guard(device);
    cudaFuncAttributes attributes;
    check_cuda(cudaFuncGetAttributes(&attributes, Squeeze::kernel<SmallTile, SmallParams, Products::one>),
               "cudaFuncGetAttributes");
  } catch (const std::runtime_error& error) {
    return std::string(error.what()) + "; " + versions;
  }
  return "";
}

std::vector<int> architectures() {
  std::vector<int> result;
#ifdef __CUDA_ARCH_LIST__
  for (int architecture : {__CUDA_ARCH_LIST__}) result.push_back(architecture / 10);
#endif
  return result;
}

}  // namespace orepa::cuda
