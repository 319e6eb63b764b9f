// Backward: all gradients of all blocks in one launch. A thread block has one of four roles. Sums over thread blocks go
// through the workspace (reduction.cuh).
#include "backward_composed.cuh"
#include "backward_separable.cuh"
#include "launch.cuh"
#include "schedule.h"

namespace orepa::cuda {
namespace {

// The region of a tile of output channels with all their taps.
template <class Tile>
__device__ __forceinline__ Region region_of(const DeviceBlock& block, int row_tile, int column_tile) {
  Region region;
  region.group = row_tile / block.channel_tiles;
  const int first = row_tile % block.channel_tiles * block.tile_channels;
  region.first_channel = region.group * block.out_per_group + first;
  region.channels = min(block.tile_channels, block.out_per_group - first);
  region.first_tap = 0;
  region.taps = block.height * block.width;
  region.first_column = column_tile * Tile::cols;
  region.columns = min(Tile::cols, block.in_per_group - region.first_column);
  return region;
}

// Sum ds[b,o] over all terms that branch b scales, term by term.
__device__ __forceinline__ void reduce_scale_gradients(const DeviceBlock& block, const DeviceTerm* terms,
                                                       const Region& region, int term_index, const float* workspace) {
  const DeviceTerm& term = terms[term_index];
  for (int t = 0; t < term_index; ++t)
    if (terms[t].scale == term.scale) return;  // an earlier term stored this gradient
  for (int c = static_cast<int>(threadIdx.x); c < region.channels; c += static_cast<int>(blockDim.x)) {
    float sum = 0.0f;
    for (int t = term_index; t < block.terms; ++t) {
      if (terms[t].scale != term.scale) continue;
      const float* parts = workspace + block.scale_partials +
                           static_cast<std::int64_t>(terms[t].slot) * block.out_channels + region.first_channel + c;
#pragma unroll 4
      for (int s = 0; s < terms[t].slots; ++s)
        sum += load_l2(parts + static_cast<std::int64_t>(s) * block.out_channels);
    }
    store(block.grad_scales, term.scale, region.first_channel + c, 0, sum);
  }
}

// Sum dF[o,p] over column tiles. For a shared filter, sum over this tile's output channels as well, into the workspace.
template <class Tile>
__device__ __forceinline__ void reduce_filter_gradient(const DeviceBlock& block, const DeviceTerm& term,
                                                       const Region& region, int row_tile, float* workspace) {
  const int taps = term.height * term.width, column_tiles = ceil_div(block.in_per_group, Tile::cols);
  const bool shared_filter = term.grad_b.row == 0 && block.out_channels > 1;
  const std::int64_t plane = static_cast<std::int64_t>(block.out_channels) * taps;
  const float* parts = workspace + term.partials;
  const auto sum_of = [&](int channel, int tap) {
    float sum = 0.0f;
    for (int s = 0; s < column_tiles; ++s)
      sum += load_l2(parts + s * plane + static_cast<std::int64_t>(channel) * taps + tap);
    return sum;
  };
  if (shared_filter) {
    for (int tap = static_cast<int>(threadIdx.x); tap < taps; tap += Tile::threads) {
      float sum = 0.0f;
      for (int c = 0; c < region.channels; ++c) sum += sum_of(region.first_channel + c, tap);
      workspace[term.partials + column_tiles * plane + static_cast<std::int64_t>(row_tile) * taps + tap] = sum;
    }
  } else {
    for (int index = static_cast<int>(threadIdx.x); index < region.channels * taps; index += Tile::threads) {
      const int channel = region.first_channel + index / taps;
      store(term.grad_b, channel, 0, index % taps, sum_of(channel, index % taps));
    }
  }
}

// Arrive at one tile of output channels, whose partial sums this thread block has written. The last to arrive adds all
// of them up.
template <class Tile>
__device__ __forceinline__ void finish_row_tile(const SharedMemory<Tile>& shared, const DeviceBlock& block,
                                                const DeviceTerm* terms, int row_tile, float* workspace,
                                                std::int32_t* counters) {
  if (block.row_arrivals == 0) return;
  if (!arrive_last(shared, counters + block.row_counter + row_tile, block.row_arrivals)) return;
  const Region region = region_of<Tile>(block, row_tile, 0);
  bool shared_filter = false;
  for (int t = 0; t < block.terms; ++t) {
    const DeviceTerm& term = terms[t];
    if (block.grad_scales.data != nullptr && term.scale >= 0)
      reduce_scale_gradients(block, terms, region, t, workspace);
    if (term.kind == Kind::pointwise && term.grad_b.data != nullptr) {
      reduce_filter_gradient<Tile>(block, term, region, row_tile, workspace);
      shared_filter |= term.grad_b.row == 0 && block.out_channels > 1;
    }
  }
  if (!shared_filter) return;
  const int row_tiles = block.groups * block.channel_tiles;
  if (!arrive_last(shared, counters + block.shared_counter, row_tiles)) return;
  for (int t = 0; t < block.terms; ++t) {
    const DeviceTerm& term = terms[t];
    if (term.kind != Kind::pointwise || term.grad_b.data == nullptr || term.grad_b.row != 0) continue;
    const int taps = term.height * term.width, column_tiles = ceil_div(block.in_per_group, Tile::cols);
    const float* parts =
        workspace + term.partials + static_cast<std::int64_t>(column_tiles) * block.out_channels * taps;
    for (int tap = static_cast<int>(threadIdx.x); tap < taps; tap += Tile::threads) {
      float sum = 0.0f;
      for (int s = 0; s < row_tiles; ++s) sum += load_l2(parts + static_cast<std::int64_t>(s) * taps + tap);
      store(term.grad_b, 0, 0, tap, sum);
    }
  }
}

template <class Tile, class Params, Products P>
__global__ void __launch_bounds__(Tile::threads, Tile::blocks_per_sm)
    squeeze_gradients(const __grid_constant__ Params params) {
  const SharedMemory<Tile> shared{shared_memory()};
  const DeviceBlock& block = find_block(params, static_cast<int>(blockIdx.x));
  const DeviceTerm* terms = terms_of(params, block);
  int item = static_cast<int>(blockIdx.x) - block.first_item;

  // Find this thread block's role: the longest come first.
  int t = 0;
  for (; t < block.terms; ++t) {
    const int items = terms[t].items_a + terms[t].items_b;
    if (item < items) break;
    item -= items;
  }
  const int column_tiles = ceil_div(block.in_per_group, Tile::cols);
  // Keep what is needed after the role in shared memory, as registers limit the roles.
  const auto save = [&](int row_tile, int row_tiles) {
    if (threadIdx.x != 0) return;
    shared.scratch()[0] = static_cast<int>(blockIdx.x);
    shared.scratch()[1] = row_tile;
    shared.scratch()[2] = row_tiles;
  };
  if (t == block.terms) {
    const int row_tile = item / column_tiles;
    save(row_tile, 1);
    elementwise_gradients(shared, block, terms, region_of<Tile>(block, row_tile, item % column_tiles),
                          params.workspace);
  } else if (terms[t].kind == Kind::separable) {
    const int spans = ceil_div(block.channel_tiles, separable_span), group = item / (column_tiles * spans);
    const int span = item / column_tiles % spans, row_tile = group * block.channel_tiles + span * separable_span;
    save(row_tile, min(separable_span, block.channel_tiles - span * separable_span));
    separable_gradients(shared, block, terms[t], region_of<Tile>(block, row_tile, item % column_tiles), span,
                        params.workspace, params.counters);
  } else if (item < terms[t].items_a) {
    first_gradient<P>(shared, params, block, terms[t], item);
    return;
  } else {
    item -= terms[t].items_a;
    const int row_tile = item / ceil_div(terms[t].inner, Tile::cols);
    save(row_tile, 1);
    second_gradient<P>(shared, block, terms[t], row_tile, item % ceil_div(terms[t].inner, Tile::cols),
                       params.workspace);
  }
  __syncthreads();
  const DeviceBlock& saved_block = find_block(params, shared.scratch()[0]);
  const int row_tile = shared.scratch()[1], row_tiles = shared.scratch()[2];
  for (int tile = 0; tile < row_tiles; ++tile)
    finish_row_tile(shared, saved_block, terms_of(params, saved_block), row_tile + tile, params.workspace,
                    params.counters);
}

struct SqueezeGradients {
  template <class Tile, class Params, Products P>
  static constexpr auto kernel = squeeze_gradients<Tile, Params, P>;
};

}  // namespace

void backward(const Block* blocks, int count, const Context& context) {
  const DeviceGuard guard(context.device);
  for (const Schedule& launch : schedule(blocks, count, true)) launch_schedule<SqueezeGradients>(launch, context);
}

}  // namespace orepa::cuda
