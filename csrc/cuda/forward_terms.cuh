// Forward, after the products: the other terms of paper Eq. 4, added to a tile in shared memory.
#pragma once

#include "element_loops.cuh"

namespace orepa::cuda {

// W[o,i,p] += s[o] * K[o,i + shift,p], by one warp per output channel: dense terms, and the identity part of composed
// terms, which is exact because it needs no product.
template <class Tile>
__device__ __forceinline__ void add_dense(float* rows, const DeviceBlock& block, const DeviceView& view, int height,
                                          int width, const Region& region, int channel, int shift, float scale) {
  const Window window(block, height, width);
  read_elements(
      view, at(view, channel, region.first_column + shift, 0), region.columns, height * width,
      [](int tap) { return tap; },
      [&](int column, int tap, auto value) {
        const int row = window.row(tap, region);
        if (row >= 0) as<decltype(value)>(rows + row * Tile::pitch + column) += scale * value;
      });
}

// W[o,i,p] += s[o] * P[o,i] * F[o,p]; P may be absent (identity), and F (average).
template <class Tile>
__device__ __forceinline__ void add_pointwise(float* rows, const DeviceBlock& block, const DeviceTerm& term,
                                              const Region& region, int channel, float scale) {
  const int taps = term.height * term.width;
  const float average = 1.0f / static_cast<float>(taps);
  const Window window(block, term.height, term.width);
  for (int column = lane_index(); column < region.columns; column += warp_size) {
    const int in = region.first_column + column;
    float weight = scale;
    if (term.a.data != nullptr) {
      weight *= load(term.a, channel, in, 0);
    } else if (in != channel % block.in_per_group) {
      continue;
    }
    for (int tap = 0; tap < taps; ++tap) {
      const int row = window.row(tap, region);
      if (row < 0) continue;
      rows[row * Tile::pitch + column] += weight * (term.b.data != nullptr ? load(term.b, channel, 0, tap) : average);
    }
  }
}

// W[o,i,p] += s[o] * a[o,p] for the one input channel i = o / E: depthwise without pointwise.
template <class Tile>
__device__ __forceinline__ void add_depthwise(float* rows, const DeviceBlock& block, const DeviceTerm& term,
                                              const Region& region, int channel, float scale) {
  const int column = channel / term.inner - region.group * block.in_per_group - region.first_column;
  if (column < 0 || column >= region.columns) return;
  const Window window(block, term.height, term.width);
  for (int tap = lane_index(); tap < term.height * term.width; tap += warp_size) {
    const int row = window.row(tap, region);
    if (row >= 0) rows[row * Tile::pitch + column] += scale * load(term.a, channel, 0, tap);
  }
}

// W[o,i,p] += s[o] * sum_e pw[o, i*E+e] * dw[i*E+e, p], by all threads: four per column, each for different taps, with
// their depthwise filters in registers for all output channels of the tile.
template <class Tile>
__device__ __forceinline__ void add_separable(float* result, const DeviceBlock& block, const DeviceTerm& term,
                                              const Region& region) {
  constexpr int expand = 8, filters = 3;  // e and taps per thread and pass
  const int column = static_cast<int>(threadIdx.x) / 4, part = static_cast<int>(threadIdx.x) % 4;
  if (column >= region.columns) return;
  const Window window(block, term.height, term.width);
  const int taps = term.height * term.width;
  const int in = (region.first_column + column) * term.inner;              // in the rows of pw
  const int in_all = region.group * block.in_per_group * term.inner + in;  // in the rows of dw
  const bool vectorized = term.b.column == 1 && term.inner % 4 == 0 && term.b.row % 4 == 0 &&
                          term.b.type == Type::float32 && (reinterpret_cast<std::uintptr_t>(term.b.data) & 15) == 0;
  for (int e0 = 0; e0 < term.inner; e0 += expand) {
    for (int tap0 = 0; tap0 < taps; tap0 += 4 * filters) {
      float depthwise[expand][filters];
      int row[filters];
#pragma unroll
      for (int t = 0; t < filters; ++t) {
        const int tap = tap0 + 4 * t + part;
        row[t] = tap < taps ? window.row(tap, region) : -1;
#pragma unroll
        for (int e = 0; e < expand; ++e)
          depthwise[e][t] = tap < taps && e0 + e < term.inner ? load(term.a, in_all + e0 + e, 0, tap) : 0.0f;
      }
      for (int c = 0; c < region.channels; ++c) {
        const int channel = region.first_channel + c;
        float pointwise[expand];
        if (vectorized) {
#pragma unroll
          for (int e = 0; e < expand; e += 4) {
            float4 four = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            if (e0 + e < term.inner) {
              const std::int64_t offset = at(term.b, channel, in + e0 + e, 0);
              four = __ldg(reinterpret_cast<const float4*>(reinterpret_cast<const float*>(term.b.data) + offset));
            }
            pointwise[e] = four.x;
            pointwise[e + 1] = four.y;
            pointwise[e + 2] = four.z;
            pointwise[e + 3] = four.w;
          }
        } else {
#pragma unroll
          for (int e = 0; e < expand; ++e)
            pointwise[e] = e0 + e < term.inner ? load(term.b, channel, in + e0 + e, 0) : 0.0f;
        }
        const float scale = scale_of(block, term, channel);
#pragma unroll
        for (int t = 0; t < filters; ++t) {
          float sum = 0.0f;
#pragma unroll
          for (int e = 0; e < expand; ++e) sum += pointwise[e] * depthwise[e][t];
          if (row[t] >= 0) result[(c * region.taps + row[t]) * Tile::pitch + column] += scale * sum;
        }
      }
    }
  }
}

// Add one term to an output channel, by one warp; separable terms are added by `add_separable`.
template <class Tile>
__device__ __forceinline__ void add_term(float* rows, const DeviceBlock& block, const DeviceTerm& term,
                                         const Region& region, int channel) {
  const float scale = scale_of(block, term, channel);
  if (term.kind == Kind::dense || (term.kind == Kind::composed && term.identity)) {
    // id[m, i] = 1 where i = m mod Ig
    const DeviceView& view = term.kind == Kind::dense ? term.a : term.b;
    const int end = term.kind == Kind::dense ? 1 : term.inner;
#pragma unroll 1
    for (int shift = 0; shift < end; shift += block.in_per_group) {
      add_dense<Tile>(rows, block, view, term.height, term.width, region, channel, shift, scale);
      __syncwarp();
    }
  } else if (term.kind == Kind::pointwise) {
    add_pointwise<Tile>(rows, block, term, region, channel, scale);
  } else if (term.kind == Kind::separable && term.b.data == nullptr) {
    add_depthwise<Tile>(rows, block, term, region, channel, scale);
  }
}

}  // namespace orepa::cuda
