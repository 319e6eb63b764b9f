// Backward of a depthwise separable term K[o,i,p] = s[o] sum_e pw[o, i*E+e] dw[i*E+e, p].
#pragma once

#include "backward_elementwise.cuh"
#include "reduction.cuh"

namespace orepa::cuda {

// A thread block computes a tile of columns i and `separable_span` tiles of output channels, with four threads per
// column and two e per thread. Filters and their gradients stay in registers over all output channels:
//   v[e] = sum_p dW[o,i,p] dw[e,p],   dpw = s * v,   ds = <v, pw>,   ddw[e,p] = sum_o s[o] pw[o,e] dW[o,i,p]
template <class Tile>
__device__ __forceinline__ void separable_gradients(const SharedMemory<Tile>& shared, const DeviceBlock& block,
                                                    const DeviceTerm& term, Region region, int span, float* workspace,
                                                    std::int32_t* counters) {
  constexpr int expand = separable_expand / 4, filters = 9;  // e and taps per thread and pass
  const int column = static_cast<int>(threadIdx.x) / 4, part = static_cast<int>(threadIdx.x) % 4;
  const bool inside = column < region.columns;
  const int taps = term.height * term.width, column_tile = region.first_column / Tile::cols;
  const int in = (region.first_column + column) * term.inner;              // in the rows of pw
  const int in_all = region.group * block.in_per_group * term.inner + in;  // in the rows of dw
  const int channel_tiles = min(separable_span, block.channel_tiles - span * separable_span);
  const int group_channel = region.group * block.out_per_group;
  const std::int64_t expanded = static_cast<std::int64_t>(block.groups) * block.in_per_group * term.inner;
  const bool needs_scale_grad = block.grad_scales.data != nullptr && term.scale >= 0;
  const Window window(block, term.height, term.width);
  region.taps = taps;

  for (int e0 = part * expand, pass = 0; pass * separable_expand < term.inner; e0 += separable_expand, ++pass) {
    for (int tap0 = 0; tap0 < taps; tap0 += filters) {
      float depthwise[expand][filters], sums[expand][filters];
#pragma unroll
      for (int e = 0; e < expand; ++e)
#pragma unroll
        for (int t = 0; t < filters; ++t) {
          const bool exists = inside && e0 + e < term.inner && tap0 + t < taps;
          depthwise[e][t] = exists ? load(term.a, in_all + e0 + e, 0, tap0 + t) : 0.0f;
          sums[e][t] = 0.0f;
        }
      for (int tile = 0; tile < channel_tiles; ++tile) {
        const int first = (span * separable_span + tile) * block.tile_channels;
        region.first_channel = group_channel + first;
        region.channels = min(block.tile_channels, block.out_per_group - first);
        for (int c = warp_index(); c < region.channels; c += Tile::warps)
          load_upstream<Tile, 1>(shared.result() + c * taps * Tile::pitch, block, region, window,
                                 region.first_channel + c);
        __syncthreads();
        for (int c = 0; c < region.channels; ++c) {
          const int channel = region.first_channel + c;
          const float* rows = shared.result() + c * taps * Tile::pitch + column;
          float upstream[filters], share = 0.0f;
#pragma unroll
          for (int t = 0; t < filters; ++t)
            upstream[t] = inside && tap0 + t < taps ? rows[(tap0 + t) * Tile::pitch] : 0.0f;
          const float scale = scale_of(block, term, channel);
#pragma unroll
          for (int e = 0; e < expand; ++e) {
            if (!inside || e0 + e >= term.inner) continue;
            const float pointwise = load(term.b, channel, in + e0 + e, 0);
#pragma unroll
            for (int t = 0; t < filters; ++t) sums[e][t] += scale * pointwise * upstream[t];
            if (tap0 > 0) continue;
            float v = 0.0f;
#pragma unroll
            for (int t = 0; t < filters; ++t) v += upstream[t] * depthwise[e][t];
#pragma unroll 1
            for (int tap = filters; tap < taps; ++tap)
              v += rows[tap * Tile::pitch] * load(term.a, in_all + e0 + e, 0, tap);
            share += v * pointwise;
            if (term.grad_b.data != nullptr) store(term.grad_b, channel, in + e0 + e, 0, scale * v);
          }
          if (needs_scale_grad && tap0 == 0) {
            share = warp_sum(share);
            if (lane_index() == 0) shared.sums()[warp_index() * Tile::rows + c] = share;
          }
        }
        __syncthreads();
        if (needs_scale_grad && tap0 == 0 && static_cast<int>(threadIdx.x) < region.channels) {
          const int c = static_cast<int>(threadIdx.x);
          float sum = 0.0f;
          for (int warp = 0; warp < Tile::warps; ++warp) sum += shared.sums()[warp * Tile::rows + c];
          const std::int64_t slot = term.slot + pass * ceil_div(block.in_per_group, Tile::cols) + column_tile;
          workspace[block.scale_partials + slot * block.out_channels + region.first_channel + c] = sum;
        }
      }
      if (term.grad_a.data == nullptr || !inside) continue;
      // [span, i*E+e, p] in the workspace
#pragma unroll
      for (int e = 0; e < expand; ++e)
#pragma unroll
        for (int t = 0; t < filters; ++t)
          if (e0 + e < term.inner && tap0 + t < taps)
            workspace[term.partials + (span * expanded + in_all + e0 + e) * taps + tap0 + t] = sums[e][t];
    }
  }

  if (term.grad_a.data == nullptr) return;
  const int spans = ceil_div(block.channel_tiles, separable_span);
  const int counter = term.counter + region.group * ceil_div(block.in_per_group, Tile::cols) + column_tile;
  if (!arrive_last(shared, counters + counter, spans)) return;
  const int first = (region.group * block.in_per_group + region.first_column) * term.inner;
  const FastDivider divider(taps);
  for (int index = static_cast<int>(threadIdx.x); index < region.columns * term.inner * taps; index += Tile::threads) {
    const float* sums = workspace + term.partials + static_cast<std::int64_t>(first) * taps + index;
    float sum = 0.0f;
#pragma unroll 4
    for (int s = 0; s < spans; ++s) sum += load_l2(sums + s * expanded * taps);
    store(term.grad_a, first + divider.quotient(index), 0, divider.remainder(index), sum);
  }
}

}  // namespace orepa::cuda
