#include "schedule.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>

namespace orepa::cuda {
namespace {

constexpr int target_items = 264;  // two thread blocks per SM of a large GPU

bool fits_int32(std::int64_t value) {
  return value >= std::numeric_limits<std::int32_t>::min() && value <= std::numeric_limits<std::int32_t>::max();
}

DeviceView to_device(const View& view) {
  return {static_cast<unsigned char*>(view.data), static_cast<std::int32_t>(view.row),
          static_cast<std::int32_t>(view.column), static_cast<std::int32_t>(view.tap), view.type};
}

std::string unsupported_reason(const View& view, const char* name) {
  if (view.data == nullptr) return "";
  if (view.type == Type::float64) return std::string(name) + " is float64, and the CUDA kernels compute in float32";
  if (!fits_int32(view.row) || !fits_int32(view.column) || !fits_int32(view.tap))
    return std::string(name) + " has a stride of 2^31 or more";
  return "";
}

// A forward tile has all taps of its output channels, as taps share most operands. But if both factors of a composition
// are larger than 1x1, a tile has one tap, which skips the zeros around the factors.
int taps_of_tile(const Block& block, bool backward) {
  const auto has_large_first = [](const Term& term) { return term.kind == Kind::composed && term.first_taps() > 1; };
  return !backward && std::any_of(block.term, block.term + block.terms, has_large_first) ? 1 : block.taps();
}

// Number of tiles of W.
std::int64_t kernel_tiles(const Block& block, const TileShape& tile, bool backward) {
  const int taps = taps_of_tile(block, backward), channels = std::max(tile.rows / taps, 1);
  return block.groups * (block.taps() / taps) * ceil_div(static_cast<int>(block.out_per_group()), channels) *
         ceil_div(static_cast<int>(block.in_per_group), tile.cols);
}

// Large tiles move less data. Small ones spread little work over more SMs, and waste less on few channels.
bool use_large_tiles(const Block* const* blocks, int count, bool backward) {
  std::int64_t large = 0, small = 0;
  for (int i = 0; i < count; ++i) {
    if (blocks[i]->taps() > small_shape.rows) return true;
    large += kernel_tiles(*blocks[i], large_shape, backward);
    small += kernel_tiles(*blocks[i], small_shape, backward);
  }
  const std::int64_t large_area = large * large_shape.rows * large_shape.cols;
  const std::int64_t small_area = small * small_shape.rows * small_shape.cols;
  return large >= target_items / 2 && 10 * small_area >= 7 * large_area;
}

DeviceTerm to_device(const Term& term) {
  DeviceTerm device{};
  device.a = to_device(term.a);
  device.b = to_device(term.b);
  device.inner = term.inner;
  device.scale = static_cast<std::int16_t>(term.scale);
  device.kind = term.kind;
  device.identity = term.identity;
  device.height = static_cast<std::uint8_t>(term.height);
  device.width = static_cast<std::uint8_t>(term.width);
  device.first_height = static_cast<std::uint8_t>(term.first_height);
  device.first_width = static_cast<std::uint8_t>(term.first_width);
  return device;
}

// Schedules the backward pass of one block: items, counters, and workspace for partial sums.
class BackwardPlanner {
 public:
  BackwardPlanner(Schedule& schedule, const Block& block, DeviceBlock& device, const TileShape& tile)
      : schedule_(schedule),
        block_(block),
        device_(device),
        tile_(tile),
        column_tiles_(ceil_div(device.in_per_group, tile.cols)),
        row_tiles_(device.groups * device.channel_tiles) {}

  void run(DeviceTerm* terms) {
    for (int t = 0; t < block_.terms; ++t) add(block_.term[t], terms[t]);
    device_.elementwise_items = elementwise_ ? row_tiles_ * column_tiles_ : 0;
    device_.row_arrivals = sums_over_rows_ ? arrivals_ + (elementwise_ ? column_tiles_ : 0) : 0;
    device_.row_counter = counters(device_.row_arrivals > 0 ? row_tiles_ : 0);
    device_.shared_counter = counters(shared_filter_ ? 1 : 0);
    device_.scale_partials = floats(static_cast<std::int64_t>(slots_) * device_.out_channels);
    items_ += device_.elementwise_items;
    schedule_.items += items_;
  }

 private:
  void add(const Term& term, DeviceTerm& device) {
    device.grad_a = to_device(term.grad_a);
    device.grad_b = to_device(term.grad_b);
    const bool scaled = block_.needs_scale_grad(term);
    sums_over_rows_ |= scaled;
    if (term.kind == Kind::composed) {
      if (term.grad_a.data != nullptr) add_first(term, device);
      if (term.grad_b.data != nullptr || scaled) {
        const int tiles = ceil_div(term.inner, tile_.cols);
        device.items_b = row_tiles_ * tiles;
        items_ += device.items_b;
        add_arrivals(device, tiles, scaled);
      }
    } else if (term.kind == Kind::separable && term.b.data != nullptr) {
      if (term.grad_a.data != nullptr || term.grad_b.data != nullptr || scaled) add_separable(term, device, scaled);
    } else if (term.grad_a.data != nullptr || term.grad_b.data != nullptr || scaled) {
      elementwise_ = true;
      if (scaled) take_slots(device, column_tiles_);
      if (term.kind == Kind::pointwise && term.grad_b.data != nullptr) add_filter(term, device);
    }
  }

  // grad_a of a composed term: its depth, all (o, q), is split over thread blocks.
  void add_first(const Term& term, DeviceTerm& device) {
    const std::int64_t depth = static_cast<std::int64_t>(device_.out_per_group) * term.second_taps();
    const std::int64_t tiles = static_cast<std::int64_t>(device_.groups) * term.first_taps() *
                               ceil_div(term.inner, tile_.rows) * column_tiles_;
    const std::int64_t splits = std::max<std::int64_t>(std::min((target_items + tiles - 1) / tiles, depth / 256), 1);
    const int part_depth = ceil_div(static_cast<int>((depth + splits - 1) / splits), tile_.depth) * tile_.depth;
    device.splits = ceil_div(static_cast<int>(depth), part_depth);
    device.items_a = static_cast<std::int32_t>(tiles * device.splits);
    items_ += device.items_a;
    if (device.splits == 1) return;
    device.counter = counters(tiles);
    device.partials = floats(static_cast<std::int64_t>(device.splits) * term.first_taps() * device_.groups *
                             term.inner * device_.in_per_group);
  }

  void add_separable(const Term& term, DeviceTerm& device, bool scaled) {
    const int spans = ceil_div(device_.channel_tiles, separable_span), passes = ceil_div(term.inner, separable_expand);
    device.items_b = device_.groups * spans * column_tiles_;
    items_ += device.items_b;
    add_arrivals(device, column_tiles_, scaled, passes);
    if (term.grad_a.data == nullptr) return;
    device.counter = counters(static_cast<std::int64_t>(device_.groups) * column_tiles_);
    device.partials = floats(static_cast<std::int64_t>(spans) * device_.groups * device_.in_per_group * term.inner *
                             term.height * term.width);
  }

  // Filter gradients: sums over columns, and over all output channels if they share the filter.
  void add_filter(const Term& term, DeviceTerm& device) {
    const int taps = term.height * term.width;
    sums_over_rows_ = true;
    shared_filter_ |= term.grad_b.row == 0 && device_.out_channels > 1;
    device.partials = floats((static_cast<std::int64_t>(column_tiles_) * device_.out_channels + row_tiles_) * taps);
  }

  void add_arrivals(DeviceTerm& device, int tiles, bool scaled, int slots_per_tile = 1) {
    arrivals_ += tiles;
    if (scaled) take_slots(device, tiles * slots_per_tile);
  }

  void take_slots(DeviceTerm& device, int slots) {
    device.slot = slots_;
    device.slots = slots;
    slots_ += slots;
  }

  std::int64_t floats(std::int64_t count) {
    schedule_.workspace_floats += count;
    return schedule_.workspace_floats - count;
  }

  std::int32_t counters(std::int64_t count) {
    schedule_.counters += count;
    return static_cast<std::int32_t>(schedule_.counters - count);
  }

  Schedule& schedule_;
  const Block& block_;
  DeviceBlock& device_;
  const TileShape& tile_;
  const int column_tiles_, row_tiles_;
  int slots_ = 0, arrivals_ = 0;
  std::int64_t items_ = 0;
  bool elementwise_ = false, sums_over_rows_ = false, shared_filter_ = false;
};

void add_block(Schedule& schedule, const Block& block, bool backward) {
  const TileShape& tile = schedule.large_tiles ? large_shape : small_shape;
  DeviceBlock device{};
  device.scales = to_device(block.scales);
  device.grad_scales = to_device(block.grad_scales);
  device.kernel = to_device(block.kernel);
  device.terms = block.terms;
  device.first_term = static_cast<std::int32_t>(schedule.terms.size());
  device.first_item = static_cast<std::int32_t>(schedule.items);
  device.out_channels = static_cast<std::int32_t>(block.out_channels);
  device.in_per_group = static_cast<std::int32_t>(block.in_per_group);
  device.out_per_group = static_cast<std::int32_t>(block.out_per_group());
  device.groups = static_cast<std::int32_t>(block.groups);
  device.height = block.height;
  device.width = block.width;
  device.tile_taps = taps_of_tile(block, backward);
  device.tap_tiles = block.taps() / device.tile_taps;
  // As few tiles as possible, of nearly equal size.
  device.channel_tiles = ceil_div(device.out_per_group, std::max(tile.rows / device.tile_taps, 1));
  device.tile_channels = ceil_div(device.out_per_group, device.channel_tiles);
  device.channel_tiles = ceil_div(device.out_per_group, device.tile_channels);
  for (int t = 0; t < block.terms; ++t) schedule.terms.push_back(to_device(block.term[t]));
  if (backward) {
    BackwardPlanner(schedule, block, device, tile).run(&schedule.terms[device.first_term]);
  } else {
    schedule.items += static_cast<std::int64_t>(device.groups) * device.tap_tiles * device.channel_tiles *
                      ceil_div(device.in_per_group, tile.cols);
  }
  if (schedule.items > std::numeric_limits<std::int32_t>::max() ||
      schedule.counters > std::numeric_limits<std::int32_t>::max())
    throw std::invalid_argument("these blocks are too large for one launch");
  schedule.blocks.push_back(device);
}

// Sort key: an estimate of a thread block's work.
std::int64_t depth_of(const Block& block) {
  std::int64_t depth = 1;
  for (int t = 0; t < block.terms; ++t)
    if (block.term[t].kind == Kind::composed)
      depth += static_cast<std::int64_t>(block.term[t].inner) * block.term[t].first_taps();
  return depth;
}

}  // namespace

std::string unsupported_reason(const Block& block) {
  if (block.terms < 1 || block.terms > max_terms)
    return "a block must have 1 to " + std::to_string(max_terms) + " terms";
  if (block.taps() > max_taps) return "kernels of more than " + std::to_string(max_taps) + " taps are not covered";
  if (!fits_int32(block.out_channels * block.taps() * 128) || !fits_int32(block.in_per_group * block.groups * 128))
    return "too many channels";
  for (const auto& [view, name] :
       {std::pair{&block.scales, "scales"}, std::pair{&block.grad_scales, "scales' gradient"},
        std::pair{&block.kernel, "kernel"}})
    if (auto reason = unsupported_reason(*view, name); !reason.empty()) return reason;
  for (int t = 0; t < block.terms; ++t) {
    const Term& term = block.term[t];
    for (const auto& [view, name] : {std::pair{&term.a, "an operand"}, std::pair{&term.b, "an operand"},
                                     std::pair{&term.grad_a, "a gradient"}, std::pair{&term.grad_b, "a gradient"}})
      if (auto reason = unsupported_reason(*view, name); !reason.empty()) return reason;
  }
  return "";
}

std::vector<Schedule> schedule(const Block* blocks, int count, bool backward) {
  std::vector<const Block*> order(count);
  for (int i = 0; i < count; ++i) {
    if (auto reason = unsupported_reason(blocks[i]); !reason.empty()) throw std::invalid_argument(reason);
    order[i] = blocks + i;
  }
  std::stable_sort(order.begin(), order.end(),
                   [](const Block* a, const Block* b) { return depth_of(*a) > depth_of(*b); });
  std::vector<Schedule> launches;
  for (int begin = 0, end = 0; begin < count; begin = end) {
    std::size_t bytes = 0;
    while (end < count) {
      bytes += sizeof(DeviceBlock) + order[end]->terms * sizeof(DeviceTerm);
      if (bytes > LargeParams::capacity) break;
      ++end;
    }
    Schedule& launch = launches.emplace_back();
    launch.large_tiles = use_large_tiles(&order[begin], end - begin, backward);
    for (int i = begin; i < end; ++i) add_block(launch, *order[i], backward);
  }
  return launches;
}

MemoryNeeds memory_needs(const Block* blocks, int count, bool backward) {
  // With all gradients, as each adds to the needs and none reduces them.
  std::vector<Block> with_gradients(blocks, blocks + count);
  for (Block& block : with_gradients) {
    block.grad_scales = block.scales;
    for (Term& term : block.term) {
      term.grad_a = term.a;
      term.grad_b = term.b;
    }
  }
  MemoryNeeds needs;
  for (const Schedule& launch : schedule(with_gradients.data(), count, backward)) {
    needs.workspace_bytes = std::max<std::int64_t>(needs.workspace_bytes, launch.workspace_floats * sizeof(float));
    needs.counter_bytes = std::max<std::int64_t>(needs.counter_bytes, launch.counters * sizeof(std::int32_t));
  }
  return needs;
}

void check_memory(const Schedule& schedule, const Context& context) {
  const std::int64_t workspace = schedule.workspace_floats * sizeof(float),
                     counters = schedule.counters * sizeof(std::int32_t);
  if (workspace > context.workspace_bytes || counters > context.counter_bytes)
    throw std::invalid_argument("needs " + std::to_string(workspace) + " bytes of workspace and " +
                                std::to_string(counters) + " of counters, got " +
                                std::to_string(context.workspace_bytes) + " and " +
                                std::to_string(context.counter_bytes));
}

}  // namespace orepa::cuda
