// Backward of the terms without matrix products: dense, pointwise with a filter, depthwise without pointwise.
#pragma once

#include "element_loops.cuh"

namespace orepa::cuda {

// Load dW of one output channel into its rows of a tile, by one warp: all taps, or those of a smaller, centred kernel.
template <class Tile, int Batch = 3>
__device__ __forceinline__ void load_upstream(float* rows, const DeviceBlock& block, const Region& region,
                                              const Window& window, int channel) {
  read_elements<Batch>(
      block.kernel, at(block.kernel, channel, region.first_column, 0), region.columns, region.taps,
      [&](int tap) { return window.tap(tap); },
      [&](int column, int tap, auto value) { as<decltype(value)>(rows + tap * Tile::pitch + column) = value; });
}

// da = s * dW. Returns this lane's share of ds = <dW, a>.
template <class Tile>
__device__ __forceinline__ float dense_gradient(float* rows, const DeviceBlock& block, const DeviceTerm& term,
                                                const Region& region, int channel, float scale, bool needs_scale_grad) {
  const Window window(block, term.height, term.width);
  const int taps = term.height * term.width;
  if (term.grad_a.data != nullptr)
    write_elements(term.grad_a, at(term.grad_a, channel, region.first_column, 0), region.columns, taps,
                   [&](int column, int tap, auto value) {
                     return scale * as<decltype(value)>(rows + window.tap(tap) * Tile::pitch + column);
                   });
  float share = 0.0f;
  if (needs_scale_grad)
    read_elements(
        term.a, at(term.a, channel, region.first_column, 0), region.columns, taps, [](int tap) { return tap; },
        [&](int column, int tap, auto value) {
          share += dot(as<decltype(value)>(rows + window.tap(tap) * Tile::pitch + column), value);
        });
  return share;
}

// dP[o,i] = s * v and ds = <v, P> with v = sum_p dW[o,i,p] F[o,p]. Per column tile, dF[o,p] = s * sum_i dW[o,i,p]
// P[o,i].
template <class Tile>
__device__ __forceinline__ float pointwise_gradient(const float* rows, const DeviceBlock& block, const DeviceTerm& term,
                                                    const Region& region, int channel, float scale,
                                                    bool needs_scale_grad, float* filter_sums) {
  const int taps = term.height * term.width;
  const float average = 1.0f / static_cast<float>(taps);
  const Window window(block, term.height, term.width);
  const auto weight = [&](int column) {
    const int in = region.first_column + column;
    if (term.a.data != nullptr) return load(term.a, channel, in, 0);
    return in == channel % block.in_per_group ? 1.0f : 0.0f;
  };
  float share = 0.0f;
  for (int column = lane_index(); column < region.columns; column += warp_size) {
    float v = 0.0f;
    for (int tap = 0; tap < taps; ++tap)
      v += rows[window.tap(tap) * Tile::pitch + column] *
           (term.b.data != nullptr ? load(term.b, channel, 0, tap) : average);
    if (term.grad_a.data != nullptr) store(term.grad_a, channel, region.first_column + column, 0, scale * v);
    if (needs_scale_grad) share += v * weight(column);
  }
  if (term.grad_b.data == nullptr) return share;
  for (int tap = 0; tap < taps; ++tap) {
    float sum = 0.0f;
    for (int column = lane_index(); column < region.columns; column += warp_size)
      sum += rows[window.tap(tap) * Tile::pitch + column] * weight(column);
    sum = warp_sum(sum);
    if (lane_index() == 0) filter_sums[tap] = scale * sum;
  }
  return share;
}

// da[o,p] = s * dW[o,i,p] for the one i = o / E.
template <class Tile>
__device__ __forceinline__ float depthwise_gradient(const float* rows, const DeviceBlock& block, const DeviceTerm& term,
                                                    const Region& region, int channel, float scale,
                                                    bool needs_scale_grad) {
  const int column = channel / term.inner - region.group * block.in_per_group - region.first_column;
  if (column < 0 || column >= region.columns) return 0.0f;
  const Window window(block, term.height, term.width);
  float share = 0.0f;
  for (int tap = lane_index(); tap < term.height * term.width; tap += warp_size) {
    const float upstream = rows[window.tap(tap) * Tile::pitch + column];
    if (term.grad_a.data != nullptr) store(term.grad_a, channel, 0, tap, scale * upstream);
    if (needs_scale_grad) share += upstream * load(term.a, channel, 0, tap);
  }
  return share;
}

// All elementwise terms of a tile. Warps process different output channels, without barriers.
template <class Tile>
__device__ __forceinline__ void elementwise_gradients(const SharedMemory<Tile>& shared, const DeviceBlock& block,
                                                      const DeviceTerm* terms, const Region& region, float* workspace) {
  const int column_tile = region.first_column / Tile::cols;
  const Window all_taps(block, block.height, block.width);
  for (int c = warp_index(); c < region.channels; c += Tile::warps) {
    const int channel = region.first_channel + c;
    float* rows = shared.result() + c * region.taps * Tile::pitch;
    load_upstream<Tile>(rows, block, region, all_taps, channel);
    __syncwarp();
    for (int t = 0; t < block.terms; ++t) {
      const DeviceTerm& term = terms[t];
      const bool needs_scale_grad = block.grad_scales.data != nullptr && term.scale >= 0;
      if (term.grad_a.data == nullptr && term.grad_b.data == nullptr && !needs_scale_grad) continue;
      const float scale = scale_of(block, term, channel);
      float share = 0.0f;
      if (term.kind == Kind::dense) {
        share = dense_gradient<Tile>(rows, block, term, region, channel, scale, needs_scale_grad);
      } else if (term.kind == Kind::pointwise) {
        // [column tile, o, p] in the workspace
        float* filter_sums =
            workspace + term.partials +
            (static_cast<std::int64_t>(column_tile) * block.out_channels + channel) * (term.height * term.width);
        share = pointwise_gradient<Tile>(rows, block, term, region, channel, scale, needs_scale_grad, filter_sums);
      } else if (term.kind == Kind::separable && term.b.data == nullptr) {
        share = depthwise_gradient<Tile>(rows, block, term, region, channel, scale, needs_scale_grad);
      } else {
        continue;
      }
      if (!needs_scale_grad) continue;
      share = warp_sum(share);
      if (lane_index() == 0) {
        const std::int64_t slot = term.slot + column_tile;
        workspace[block.scale_partials + slot * block.out_channels + channel] = share;
      }
    }
  }
}

}  // namespace orepa::cuda
