// Backward of a composed term K = s * (b o a): two matrix products and, in the epilogue of one, the scale's gradient.
#pragma once

#include "arrive.cuh"
#include "multiply.cuh"

namespace orepa::cuda {

// Depths (o, q), with q the taps of b: lines of b, and of dW seen through tap r of a. A few threads prepare them for all.
template <class Tile>
struct DepthTables {
    const Shared<Tile>& shared;
    const DeviceBlock& block;
    const DeviceTerm& term;
    int first_channel, end;
    int top, left;  // where q = 0 and this r meet in dW
    Divider taps, width;

    __device__ __forceinline__ const std::int64_t* lines_of_b() const { return shared.offsets(); }
    __device__ __forceinline__ const std::int64_t* lines_of_w() const { return shared.offsets() + 2 * Tile::depth; }

    __device__ __forceinline__ void lines(int k, int stage) const {
        static_assert(2 * Tile::depth <= Tile::threads);
        const int thread = static_cast<int>(threadIdx.x);
        if (thread >= 2 * Tile::depth) return;
        const int line = k + thread % Tile::depth;
        const bool of_w = thread >= Tile::depth;
        std::int64_t offset = -1;
        if (line < end) {
            const int channel = first_channel + taps.quotient(line), q = taps.remainder(line);
            offset = of_w ? at(block.kernel, channel, 0, (width.quotient(q) + top) * block.width + width.remainder(q) + left)
                          : at(term.b, channel, 0, q);
        }
        shared.offsets()[(of_w ? 2 + stage : stage) * Tile::depth + thread % Tile::depth] = offset;
    }
    __device__ __forceinline__ void factors(int k, int stage) const {
        const int thread = static_cast<int>(threadIdx.x);
        if (thread >= Tile::depth) return;
        const bool inside = k + thread < end;
        shared.factors()[stage * Tile::depth + thread] =
            inside ? scale_of(block, term, first_channel + taps.quotient(k + thread)) : 0.0f;
    }
};

// da[m,i,r] = sum_{o,q} s[o] b[o,m,q] dW[o,i,q+r]. One thread block does one r, a tile of (m, i) and a part of the depth.
template <class Tile>
__device__ __forceinline__ void first_gradient(const Shared<Tile>& shared, const DeviceBlock& block, const DeviceTerm& term,
                                               int item, float* workspace, std::int32_t* counters, bool full) {
    const int column_tiles = ceil_div(block.in_per_group, Tile::cols), row_tiles = ceil_div(term.inner, Tile::rows);
    const int first_taps = term.first_height * term.first_width;
    const int part = item % term.splits;
    item /= term.splits;
    const int result = item;  // its number among all tiles of this term
    const int first_column = item % column_tiles * Tile::cols;
    item /= column_tiles;
    const int first_row = item % row_tiles * Tile::rows;
    item /= row_tiles;
    const int r = item % first_taps, group = item / first_taps;

    const int b_height = term.height - term.first_height + 1, b_width = term.width - term.first_width + 1;
    const int b_taps = b_height * b_width, depth = block.out_per_group * b_taps;
    const int each = ceil_div(ceil_div(depth, term.splits), Tile::depth) * Tile::depth;
    const int begin = part * each, end = min(begin + each, depth);
    const int top = (block.height - term.height) / 2 + r / term.first_width;
    const int left = (block.width - term.width) / 2 + r % term.first_width;
    const int first_channel = group * block.out_per_group;
    const DepthTables<Tile> tables{shared, block, term, first_channel, end, top, left, Divider(b_taps), Divider(b_width)};

    Sums<Tile> sums;
    multiply<Tile, true, false>(
        sums, shared,
        Operand<TableLines>{Source(term.b, term.inner, b_taps),
                            {tables.lines_of_b(), Tile::depth},
                            first_row,
                            term.inner,
                            term.b.type != Type::float32 && term.scale < 0},
        Operand<TableLines>{Source(block.kernel, block.in_per_group, block.height * block.width),
                            {tables.lines_of_w(), Tile::depth},
                            first_column,
                            block.in_per_group,
                            block.kernel.type != Type::float32},
        begin, end, full, tables);

    const int rows = min(Tile::rows, term.inner - first_row), columns = min(Tile::cols, block.in_per_group - first_column);
    const int first_m = group * term.inner + first_row;
    const std::int64_t all_rows = static_cast<std::int64_t>(block.groups) * term.inner;
    // [part, r, m, i] in the workspace
    const auto partial = [&](int p, int m, int i) {
        return workspace + term.partials +
               ((static_cast<std::int64_t>(p) * first_taps + r) * all_rows + first_m + m) * block.in_per_group +
               first_column + i;
    };
    sums.write(shared.result());
    __syncthreads();
    const auto each_element = [&](const auto& visit) {
        for (int m = warp_index(); m < rows; m += Tile::warps)
            for (int i = lane_index(); i < columns; i += warp_size) visit(m, i);
    };
    if (term.splits == 1) {
        each_element([&](int m, int i) {
            store(term.grad_a, first_m + m, first_column + i, r, shared.result()[m * Tile::pitch + i]);
        });
        return;
    }
    each_element([&](int m, int i) { *partial(part, m, i) = shared.result()[m * Tile::pitch + i]; });
    if (!arrive_last(shared, counters + term.counter + result, term.splits)) return;
    each_element([&](int m, int i) {
        float sum = 0.0f;
#pragma unroll 4
        for (int p = 0; p < term.splits; ++p) sum += load_fresh(partial(p, m, i));
        store(term.grad_a, first_m + m, first_column + i, r, sum);
    });
}

// U[o,m,q] = sum_{i,r} dW[o,i,q+r] a[m,i,r], the identity part of a exactly; db = s * U and ds = <U, b>: the branch's own
// kernel is not needed. Returns the group and tile of output channels that the thread block has arrived at.
template <class Tile>
__device__ __forceinline__ int second_gradient(const Shared<Tile>& shared, const DeviceBlock& block, const DeviceTerm& term,
                                               int item, float* workspace, bool full) {
    const int column_tiles = ceil_div(term.inner, Tile::cols);
    const int column_tile = item % column_tiles, row_tile = item / column_tiles;
    const int group = row_tile / block.channel_tiles, channel_tile = row_tile % block.channel_tiles;
    const int first_channel = group * block.out_per_group + channel_tile * block.tile_channels;
    const int channels = min(block.tile_channels, block.out_per_group - channel_tile * block.tile_channels);
    const int first_column = column_tile * Tile::cols, columns = min(Tile::cols, term.inner - first_column);

    const int b_height = term.height - term.first_height + 1, b_width = term.width - term.first_width + 1;
    const int b_taps = b_height * b_width, first_taps = term.first_height * term.first_width;
    const int top = (block.height - term.height) / 2, left = (block.width - term.width) / 2;
    const Divider taps(b_taps), row(b_width);
    const auto kernel_tap = [&](int q, int r_h, int r_w) {
        return (row.quotient(q) + top + r_h) * block.width + row.remainder(q) + left + r_w;
    };

    const Source source_a(term.a, block.in_per_group, first_taps);
    const Source source_w(block.kernel, block.in_per_group, block.height * block.width);
    Sums<Tile> sums;
    for (int r = 0; r < first_taps; ++r) {
        const int r_h = r / term.first_width, r_w = r - r_h * term.first_width;
        for (int line = static_cast<int>(threadIdx.x); line < Tile::rows; line += Tile::threads) {
            const int c = taps.quotient(line), q = taps.remainder(line);
            shared.offsets()[line] = c < channels ? at(block.kernel, first_channel + c, 0, kernel_tap(q, r_h, r_w)) : -1;
            shared.factors()[line] = 1.0f;
        }
        __syncthreads();
        multiply<Tile, false, true>(sums, shared,
                                    Operand<TableLines>{source_w,
                                                        {shared.offsets(), 0},
                                                        0,
                                                        0,
                                                        block.kernel.type != Type::float32},
                                    Operand<EvenLines>{source_a,
                                                       {at(term.a, group * term.inner, 0, r), term.a.row, term.inner},
                                                       first_column,
                                                       0,
                                                       term.a.type != Type::float32},
                                    0, block.in_per_group, full, SameTables{});
    }
    sums.write(shared.result());
    __syncthreads();

    const bool scale_wanted = block.grad_scales.data != nullptr && term.scale >= 0;
    const Divider in_per_group(block.in_per_group);
    for (int c = warp_index(); c < channels; c += Tile::warps) {
        const int channel = first_channel + c;
        const float scale = scale_of(block, term, channel);
        float inner_product = 0.0f;
        walk(columns, b_taps, taps_first(term.b), [&](int column, int q) {
            float u = shared.result()[(c * b_taps + q) * Tile::pitch + column];
            if (term.identity)
                u += load(block.kernel, channel, in_per_group.remainder(first_column + column), kernel_tap(q, 0, 0));
            if (term.grad_b.data != nullptr) store(term.grad_b, channel, first_column + column, q, scale * u);
            if (scale_wanted) inner_product += u * load(term.b, channel, first_column + column, q);
        });
        if (!scale_wanted) continue;
        inner_product = warp_sum(inner_product);
        if (lane_index() == 0) {
            const std::int64_t slot = term.slot + column_tile;
            workspace[block.scale_partials + slot * block.out_channels + channel] = inner_product;
        }
    }
    return row_tile;
}

}  // namespace orepa::cuda
