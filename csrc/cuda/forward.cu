// Forward: one thread block computes one tile of W, all branches of it, and writes it once.
#include "forward_terms.cuh"
#include "gemm.cuh"
#include "launch.cuh"
#include "schedule.h"

namespace orepa::cuda {
namespace {

// b o a (paper Eq. 3): rows (o, p), columns i, and for each tap r of a a depth of internal channels m:
//   sums[(o,p), i] += s[o] * b[o, m, p - r] * a[m, i, r]
template <class Tile>
__device__ __forceinline__ void add_composed(Sums<Tile>& sums, const Shared<Tile>& shared, const DeviceBlock& block,
                                             const DeviceTerm& term, const Place& place, bool full) {
  const int b_height = term.height - term.first_height + 1, b_width = term.width - term.first_width + 1;
  const int top = (block.height - term.height) / 2, left = (block.width - term.width) / 2;
  const Divider tile_taps(place.taps), width(block.width);
  const Source source_a(term.a, block.in_per_group, term.first_height * term.first_width);
  const Source source_b(term.b, term.inner, b_height * b_width);
  for (int r = 0; r < term.first_height * term.first_width; ++r) {
    const int r_h = r / term.first_width, r_w = r - r_h * term.first_width;
    bool used = false;
    for (int row = static_cast<int>(threadIdx.x); row < Tile::rows; row += Tile::threads) {
      const int c = tile_taps.quotient(row), tap = place.first_tap + row - c * place.taps;
      const int h = width.quotient(tap) - top - r_h, w = width.remainder(tap) - left - r_w;
      const int channel = place.first_channel + c;
      const bool inside = c < place.channels && h >= 0 && h < b_height && w >= 0 && w < b_width;
      shared.offsets()[row] = inside ? at(term.b, channel, 0, h * b_width + w) : -1;
      shared.factors()[row] = inside ? scale_of(block, term, channel) : 0.0f;
      used |= inside;
    }
    if (!__syncthreads_or(used)) continue;
    const Operand<TableLines> b{source_b, {shared.offsets(), 0}, 0, 0, term.b.type != Type::float32 && term.scale < 0};
    const Operand<EvenLines> a{source_a,
                               {at(term.a, place.group * term.inner, 0, r), term.a.row, term.inner},
                               place.first_column,
                               block.in_per_group,
                               term.a.type != Type::float32};
    multiply<Tile, false, false>(sums, shared, b, a, 0, term.inner, full, SameTables{});
  }
}

template <class Tile>
__device__ __forceinline__ Place place_of(const DeviceBlock& block, int item) {
  const int column_tiles = ceil_div(block.in_per_group, Tile::cols);
  const int column_tile = item % column_tiles;
  item /= column_tiles;
  const int tap_tile = item % block.tap_tiles;
  item /= block.tap_tiles;
  const int channel_tile = item % block.channel_tiles, group = item / block.channel_tiles;
  Place place;
  place.group = group;
  place.first_channel = group * block.out_per_group + channel_tile * block.tile_channels;
  place.channels = min(block.tile_channels, block.out_per_group - channel_tile * block.tile_channels);
  place.first_tap = tap_tile * block.tile_taps;
  place.taps = block.tile_taps;
  place.first_column = column_tile * Tile::cols;
  place.columns = min(Tile::cols, block.in_per_group - place.first_column);
  return place;
}

template <class Tile, class Table>
__global__ void __launch_bounds__(Tile::threads, Tile::blocks_per_sm) squeeze(const __grid_constant__ Table table) {
  const Shared<Tile> shared{shared_memory()};
  const DeviceBlock& block = find_block(table, static_cast<int>(blockIdx.x));
  const DeviceTerm* terms = terms_of(table, block);
  const Place place = place_of<Tile>(block, static_cast<int>(blockIdx.x) - block.first_item);

  {
    Sums<Tile> sums;
    for (int t = 0; t < block.terms; ++t)
      if (terms[t].kind == Kind::composed) add_composed(sums, shared, block, terms[t], place, table.full);
    sums.write(shared.result());
  }
  __syncthreads();

  for (int t = 0; t < block.terms; ++t) {
    if (terms[t].kind != Kind::separable || terms[t].b.data == nullptr) continue;
    add_separable<Tile>(shared.result(), block, terms[t], place);
    __syncthreads();
  }

  for (int c = warp_index(); c < place.channels; c += Tile::warps) {
    const int channel = place.first_channel + c;
    float* rows = shared.result() + c * place.taps * Tile::pitch;
    for (int t = 0; t < block.terms; ++t) {
      add_term<Tile>(rows, block, terms[t], place, channel);
      __syncwarp();
    }
    const std::int64_t start = at(block.kernel, channel, place.first_column, place.first_tap);
    walk(place.columns, place.taps, taps_first(block.kernel), [&](int column, int tap) {
      store(block.kernel, start + at(block.kernel, 0, column, tap), rows[tap * Tile::pitch + column]);
    });
  }
}

}  // namespace

void forward(const Block* blocks, int count, const Context& context) {
  const DeviceGuard guard(context.device);
  for (const Schedule& launch : schedule(blocks, count, false)) {
    launch_schedule<LargeTile, SmallTile>(launch, context, [](auto tile, auto table) {
      return squeeze<typename decltype(tile)::type, typename decltype(table)::type>;
    });
  }
}

std::vector<int> architectures() {
  std::vector<int> built;
#ifdef __CUDA_ARCH_LIST__
  for (int architecture : {__CUDA_ARCH_LIST__}) built.push_back(architecture / 10);
#endif
  return built;
}

}  // namespace orepa::cuda
