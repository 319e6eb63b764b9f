// Backward of a composed term K = s * (b o a): two matrix products, one with the scale's gradient in its epilogue.
#pragma once

#include "element_loops.cuh"
#include "gemm.cuh"
#include "reduction.cuh"

namespace orepa::cuda {

// Offsets of depths (o, q), with q a tap of b, in b and (shifted by tap r of a) in dW. They are in shared memory and
// used by a few threads, to free registers for the accumulators.
struct DepthIndexing {
  std::int32_t first_channel, end;
  std::int32_t top, left;    // tap of dW at q = 0 and this r
  std::int32_t taps, width;  // of b
  std::int32_t b_row, b_tap, w_row, w_tap, w_width;
  std::int32_t scale;
  DeviceView scales;
};

template <class Tile>
struct DepthTables {
  const SharedMemory<Tile>& shared;

  static_assert(sizeof(DepthIndexing) + 16 <= Tile::scratch_bytes && 2 * Tile::depth <= Tile::threads);
  __device__ __forceinline__ DepthIndexing& depths() const { return *static_cast<DepthIndexing*>(shared.saved()); }
  __device__ __forceinline__ const std::int64_t* lines_of_b() const { return shared.offsets(); }
  __device__ __forceinline__ const std::int64_t* lines_of_w() const { return shared.offsets() + 2 * Tile::depth; }

  __device__ __forceinline__ void lines(int k, int stage) const {
    const int thread = thread_index(), line = k + thread % Tile::depth;
    if (thread >= 2 * Tile::depth) return;
    const DepthIndexing& d = depths();
    const bool of_w = thread >= Tile::depth;
    std::int64_t offset = -1;
    if (line < d.end) {
      int q = line % d.taps;
      const std::int64_t channel = d.first_channel + line / d.taps;
      if (of_w) q = (q / d.width + d.top) * d.w_width + q % d.width + d.left;
      offset = channel * (of_w ? d.w_row : d.b_row) + static_cast<std::int64_t>(q) * (of_w ? d.w_tap : d.b_tap);
    }
    shared.offsets()[(of_w ? 2 + stage : stage) * Tile::depth + thread % Tile::depth] = offset;
  }
  __device__ __forceinline__ void factors(int k, int stage) const {
    const int thread = thread_index(), line = k + thread;
    if (thread >= Tile::depth) return;
    const DepthIndexing& d = depths();
    float factor = 0.0f;
    if (line < d.end) factor = d.scale < 0 ? 1.0f : load(d.scales, d.scale, d.first_channel + line / d.taps, 0);
    shared.factors()[stage * Tile::depth + thread] = factor;
  }
};

// The tile of grad_a, and the part of its depth, that a thread block computes.
struct FirstTile {
  int part;    // of the depth
  int result;  // index among all tiles of the term
  int first_column, first_row, r, group;
};

template <class Tile>
__device__ __forceinline__ FirstTile first_tile_of(const DeviceBlock& block, const DeviceTerm& term, int item) {
  const int column_tiles = ceil_div(block.in_per_group, Tile::cols), row_tiles = ceil_div(term.inner, Tile::rows);
  const int first_taps = term.first_height * term.first_width;
  const int result = item / term.splits, rest = result / column_tiles;
  return {item % term.splits,
          result,
          result % column_tiles * Tile::cols,
          rest % row_tiles * Tile::rows,
          rest / row_tiles % first_taps,
          rest / row_tiles / first_taps};
}

// da[m,i,r] = sum_{o,q} s[o] b[o,m,q] dW[o,i,q+r]. A thread block computes one r, a tile of (m, i) and a part of the
// depth.
template <Products P, class Sides, class Tile>
__device__ __forceinline__ void first_products(Accumulators<Sides>& sums, const SharedMemory<Tile>& shared,
                                               const DeviceBlock& block, const DeviceTerm& term,
                                               const FirstTile& tile) {
  const int b_height = term.height - term.first_height + 1, b_width = term.width - term.first_width + 1;
  const int b_taps = b_height * b_width, depth = block.out_per_group * b_taps;
  const int part_depth = ceil_div(ceil_div(depth, term.splits), Tile::depth) * Tile::depth;
  const int begin = tile.part * part_depth, end = min(begin + part_depth, depth);
  const int top = (block.height - term.height) / 2 + tile.r / term.first_width;
  const int left = (block.width - term.width) / 2 + tile.r % term.first_width;
  const int first_channel = tile.group * block.out_per_group;
  const DepthTables<Tile> tables{shared};
  if (threadIdx.x == 0) {
    DepthIndexing& d = tables.depths();
    d.first_channel = first_channel;
    d.end = end;
    d.top = top;
    d.left = left;
    d.taps = b_taps;
    d.width = b_width;
    d.b_row = term.b.row;
    d.b_tap = term.b.tap;
    d.w_row = block.kernel.row;
    d.w_tap = block.kernel.tap;
    d.w_width = block.width;
    d.scale = term.scale;
    d.scales = block.scales;
  }
  __syncthreads();

  gemm<P, Factors::depths>(
      sums, shared,
      Operand<IndexedLines>{
          Source(term.b, term.inner, b_taps), {tables.lines_of_b(), Tile::depth}, tile.first_row, term.inner},
      Operand<IndexedLines>{Source(block.kernel, block.in_per_group, block.height * block.width),
                            {tables.lines_of_w(), Tile::depth},
                            tile.first_column,
                            block.in_per_group},
      begin, end, tables);
}

template <Products P, class Tile, class Params>
__device__ __forceinline__ void first_gradient(const SharedMemory<Tile>& shared, const Params& params,
                                               const DeviceBlock& block_before, const DeviceTerm& term_before,
                                               int item) {
  Accumulators<Sides<Tile, true, false, false>> sums;
  if (threadIdx.x == 0) {  // to free registers
    shared.scratch()[0] = item;
    shared.scratch()[1] = static_cast<int>(&block_before - blocks_of(params));
    shared.scratch()[2] = static_cast<int>(&term_before - terms_of(params, block_before));
  }
  first_products<P>(sums, shared, block_before, term_before, first_tile_of<Tile>(block_before, term_before, item));

  const DeviceBlock& block = blocks_of(params)[shared.scratch()[1]];
  const DeviceTerm& term = terms_of(params, block)[shared.scratch()[2]];
  const FirstTile tile = first_tile_of<Tile>(block, term, shared.scratch()[0]);
  const int first_row = tile.first_row, first_column = tile.first_column, r = tile.r;
  const int rows = min(Tile::rows, term.inner - first_row),
            columns = min(Tile::cols, block.in_per_group - first_column);
  const int first_m = tile.group * term.inner + first_row, first_taps = term.first_height * term.first_width;
  sums.write(shared.result(), Tile::pitch);
  __syncthreads();
  const auto each_result = [&](const auto& visit) {
    for (int m = warp_index(); m < rows; m += Tile::warps)
      for (int i = lane_index(); i < columns; i += warp_size) visit(m, i);
  };
  if (term.splits == 1) {
    each_result([&](int m, int i) {
      store(term.grad_a, first_m + m, first_column + i, r, shared.result()[m * Tile::pitch + i]);
    });
    return;
  }
  // [part, r, m, i] in the workspace
  const std::int64_t plane = static_cast<std::int64_t>(block.groups) * term.inner * block.in_per_group;
  float* parts = params.workspace + term.partials + r * plane +
                 static_cast<std::int64_t>(first_m) * block.in_per_group + first_column;
  float* part = parts + tile.part * first_taps * plane;
  each_result([&](int m, int i) {
    part[static_cast<std::int64_t>(m) * block.in_per_group + i] = shared.result()[m * Tile::pitch + i];
  });
  if (!arrive_last(shared, params.counters + term.counter + tile.result, term.splits)) return;
  each_result([&](int m, int i) {
    const float* address = parts + static_cast<std::int64_t>(m) * block.in_per_group + i;
    float sum = 0.0f;
#pragma unroll 4
    for (int p = 0; p < term.splits; ++p, address += first_taps * plane) sum += load_l2(address);
    store(term.grad_a, first_m + m, first_column + i, r, sum);
  });
}

// The tile of grad_b that a thread block computes.
struct SecondTile {
  int group, first_channel, channels, first_column, columns, column_tile;
  int taps, width;  // of b
};

// The tap of dW that tap q of b meets at tap (r_h, r_w) of a.
__device__ __forceinline__ int kernel_tap(const DeviceBlock& block, const DeviceTerm& term, const FastDivider& width,
                                          int q, int r_h, int r_w) {
  return (width.quotient(q) + (block.height - term.height) / 2 + r_h) * block.width + width.remainder(q) +
         (block.width - term.width) / 2 + r_w;
}

// U[o,m,q] = sum_{i,r} dW[o,i,q+r] a[m,i,r], with the identity part of a added exactly. Then db = s * U and
// ds = <U, b>, without recomputing K.
template <Products P, class Tile>
__device__ __forceinline__ void second_gradient(const SharedMemory<Tile>& shared, const DeviceBlock& block,
                                                const DeviceTerm& term, int row_tile, int column_tile,
                                                float* workspace) {
  SecondTile& saved = *static_cast<SecondTile*>(shared.saved());
  if (threadIdx.x == 0) {
    const int group = row_tile / block.channel_tiles, first = row_tile % block.channel_tiles * block.tile_channels;
    saved = {group,
             group * block.out_per_group + first,
             min(block.tile_channels, block.out_per_group - first),
             column_tile * Tile::cols,
             min(Tile::cols, term.inner - column_tile * Tile::cols),
             column_tile,
             (term.height - term.first_height + 1) * (term.width - term.first_width + 1),
             term.width - term.first_width + 1};
  }
  __syncthreads();

  Accumulators<Sides<Tile, true, true, true>> sums;
#pragma unroll 1
  for (int r = 0; r < term.first_height * term.first_width; ++r) {
    const FastDivider taps(saved.taps), width(saved.width);
    const Source source_a(term.a, block.in_per_group, term.first_height * term.first_width);
    const Source source_w(block.kernel, block.in_per_group, block.height * block.width);
    const int r_h = r / term.first_width, r_w = r - r_h * term.first_width;
    for (int line = static_cast<int>(threadIdx.x); line < Tile::rows; line += Tile::threads) {
      const int c = taps.quotient(line), q = taps.remainder(line);
      shared.offsets()[line] =
          c < saved.channels ? at(block.kernel, saved.first_channel + c, 0, kernel_tap(block, term, width, q, r_h, r_w))
                             : -1;
    }
    __syncthreads();
    gemm<P, Factors::none>(
        sums, shared, Operand<IndexedLines>{source_w, {shared.offsets(), 0}, 0, 0},
        Operand<StridedLines>{
            source_a, {at(term.a, saved.group * term.inner, 0, r), term.a.row, term.inner}, saved.first_column, 0},
        0, block.in_per_group, ConstantTables{});
  }
  sums.write(shared.result(), Tile::pitch);
  __syncthreads();

  const bool needs_scale_grad = block.grad_scales.data != nullptr && term.scale >= 0;
  const SecondTile tile = saved;
  const FastDivider width(tile.width);
  for (int c = warp_index(); c < tile.channels; c += Tile::warps) {
    const int channel = tile.first_channel + c;
    const float scale = scale_of(block, term, channel);
    float* rows = shared.result() + c * tile.taps * Tile::pitch;
    // id[m, i] = 1 where i = m mod Ig
    for (int column = 0, count = 0; term.identity && column < tile.columns; column += count) {
      const int i = (tile.first_column + column) % block.in_per_group;
      count = min(tile.columns - column, block.in_per_group - i);
      float* part = rows + column;
      read_elements(
          block.kernel, at(block.kernel, channel, i, 0), count, tile.taps,
          [&](int q) { return kernel_tap(block, term, width, q, 0, 0); },
          [&](int i, int q, auto value) {
#pragma unroll
            for (int v = 0; v < static_cast<int>(sizeof(value) / sizeof(float)); ++v)
              part[q * Tile::pitch + i + v] += reinterpret_cast<const float*>(&value)[v];
          });
      __syncwarp();
    }
    if (term.grad_b.data != nullptr)
      write_elements(
          term.grad_b, at(term.grad_b, channel, tile.first_column, 0), tile.columns, tile.taps,
          [&](int column, int q, auto value) { return scale * as<decltype(value)>(rows + q * Tile::pitch + column); });
    float inner_product = 0.0f;
    if (needs_scale_grad)
      read_elements(
          term.b, at(term.b, channel, tile.first_column, 0), tile.columns, tile.taps, [](int q) { return q; },
          [&](int column, int q, auto value) {
            inner_product += dot(as<decltype(value)>(rows + q * Tile::pitch + column), value);
          });
    if (!needs_scale_grad) continue;
    inner_product = warp_sum(inner_product);
    if (lane_index() == 0) {
      const std::int64_t slot = term.slot + tile.column_tile;
      workspace[block.scale_partials + slot * block.out_channels + channel] = inner_product;
    }
  }
}

}  // namespace orepa::cuda
