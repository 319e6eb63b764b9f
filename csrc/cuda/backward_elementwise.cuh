// Backward of the terms without a product over channels: dense, pointwise with a filter, depthwise alone.
#pragma once

#include "tile.cuh"

namespace orepa::cuda {

// dW of one output channel into its rows of a tile, by the warp that owns them: of all taps or of a smaller, centred
// kernel.
template <class Tile, int Unroll>
__device__ __forceinline__ void load_upstream(float* rows, const DeviceBlock& block, const Place& place,
                                              const Window& window, int channel) {
  const std::int64_t start = at(block.kernel, channel, place.first_column, 0);
  walk<Unroll>(place.columns, place.taps, taps_first(block.kernel), [&](int column, int tap) {
    rows[tap * Tile::pitch + column] = load(block.kernel, start + at(block.kernel, 0, column, window.tap(tap)));
  });
}

// da = s * dW; returns this lane's share of ds = <dW, a>
template <class Tile>
__device__ __forceinline__ float dense_gradient(const float* rows, const DeviceBlock& block, const DeviceTerm& term,
                                                const Place& place, int channel, float scale, bool scale_wanted) {
  const Window window(block, term.height, term.width);
  const std::int64_t start = at(term.a, channel, place.first_column, 0);
  float share = 0.0f;
  walk(place.columns, term.height * term.width, taps_first(term.a), [&](int column, int tap) {
    const float upstream = rows[window.tap(tap) * Tile::pitch + column];
    if (term.grad_a.data != nullptr) store(term.grad_a, channel, place.first_column + column, tap, scale * upstream);
    if (scale_wanted) share += upstream * load(term.a, start + at(term.a, 0, column, tap));
  });
  return share;
}

// dP[o,i] = s * v and ds = <v, P> with v = sum_p dW[o,i,p] F[o,p]; dF[o,p] = s * sum_i dW[o,i,p] P[o,i], summed up
// later
template <class Tile>
__device__ __forceinline__ float pointwise_gradient(const float* rows, const DeviceBlock& block, const DeviceTerm& term,
                                                    const Place& place, int channel, float scale, bool scale_wanted,
                                                    float* filter_sums) {
  const int taps = term.height * term.width;
  const float average = 1.0f / static_cast<float>(taps);
  const Window window(block, term.height, term.width);
  const auto weight = [&](int column) {
    const int in = place.first_column + column;
    if (term.a.data != nullptr) return load(term.a, channel, in, 0);
    return in == channel % block.in_per_group ? 1.0f : 0.0f;
  };
  float share = 0.0f;
  for (int column = lane_index(); column < place.columns; column += warp_size) {
    float v = 0.0f;
    for (int tap = 0; tap < taps; ++tap)
      v += rows[window.tap(tap) * Tile::pitch + column] *
           (term.b.data != nullptr ? load(term.b, channel, 0, tap) : average);
    if (term.grad_a.data != nullptr) store(term.grad_a, channel, place.first_column + column, 0, scale * v);
    if (scale_wanted) share += v * weight(column);
  }
  if (term.grad_b.data == nullptr) return share;
  for (int tap = 0; tap < taps; ++tap) {
    float sum = 0.0f;
    for (int column = lane_index(); column < place.columns; column += warp_size)
      sum += rows[window.tap(tap) * Tile::pitch + column] * weight(column);
    sum = warp_sum(sum);
    if (lane_index() == 0) filter_sums[tap] = scale * sum;
  }
  return share;
}

// da[o,p] = s * dW[o,i,p] for the one i = o / E
template <class Tile>
__device__ __forceinline__ float depthwise_gradient(const float* rows, const DeviceBlock& block, const DeviceTerm& term,
                                                    const Place& place, int channel, float scale, bool scale_wanted) {
  const int column = channel / term.inner - place.group * block.in_per_group - place.first_column;
  if (column < 0 || column >= place.columns) return 0.0f;
  const Window window(block, term.height, term.width);
  float share = 0.0f;
  for (int tap = lane_index(); tap < term.height * term.width; tap += warp_size) {
    const float upstream = rows[window.tap(tap) * Tile::pitch + column];
    if (term.grad_a.data != nullptr) store(term.grad_a, channel, 0, tap, scale * upstream);
    if (scale_wanted) share += upstream * load(term.a, channel, 0, tap);
  }
  return share;
}

// All such terms of a tile. Each warp owns some output channels and waits for nobody.
template <class Tile>
__device__ __forceinline__ void elementwise_gradients(const Shared<Tile>& shared, const DeviceBlock& block,
                                                      const DeviceTerm* terms, const Place& place, float* workspace) {
  const int column_tile = place.first_column / Tile::cols;
  const Window whole(block, block.height, block.width);
  for (int c = warp_index(); c < place.channels; c += Tile::warps) {
    const int channel = place.first_channel + c;
    float* rows = shared.result() + c * place.taps * Tile::pitch;
    load_upstream<Tile, 4>(rows, block, place, whole, channel);
    __syncwarp();
    for (int t = 0; t < block.terms; ++t) {
      const DeviceTerm& term = terms[t];
      const bool scale_wanted = block.grad_scales.data != nullptr && term.scale >= 0;
      if (term.grad_a.data == nullptr && term.grad_b.data == nullptr && !scale_wanted) continue;
      const float scale = scale_of(block, term, channel);
      float share = 0.0f;
      if (term.kind == Kind::dense) {
        share = dense_gradient<Tile>(rows, block, term, place, channel, scale, scale_wanted);
      } else if (term.kind == Kind::pointwise) {
        // [column tile, o, p] in the workspace
        float* filter_sums =
            workspace + term.partials +
            (static_cast<std::int64_t>(column_tile) * block.out_channels + channel) * (term.height * term.width);
        share = pointwise_gradient<Tile>(rows, block, term, place, channel, scale, scale_wanted, filter_sums);
      } else if (term.kind == Kind::separable && term.b.data == nullptr) {
        share = depthwise_gradient<Tile>(rows, block, term, place, channel, scale, scale_wanted);
      } else {
        continue;
      }
      if (!scale_wanted) continue;
      share = warp_sum(share);
      if (lane_index() == 0) {
        const std::int64_t slot = term.slot + column_tile;
        workspace[block.scale_partials + slot * block.out_channels + channel] = share;
      }
    }
  }
}

}  // namespace orepa::cuda
