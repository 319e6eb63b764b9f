#include "schedule.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>

namespace orepa::cuda {
namespace {

constexpr int wanted_items = 264;  // two thread blocks on each SM of a large GPU

bool fits(std::int64_t value) {
  return value >= std::numeric_limits<std::int32_t>::min() && value <= std::numeric_limits<std::int32_t>::max();
}

DeviceView compact(const View& view) {
  return {static_cast<unsigned char*>(view.data), static_cast<std::int32_t>(view.row),
          static_cast<std::int32_t>(view.column), static_cast<std::int32_t>(view.tap), view.type};
}

std::string why_not(const View& view, const char* name) {
  if (view.data == nullptr) return "";
  if (view.type == Type::float64) return std::string(name) + " is float64, and the CUDA kernels compute in float32";
  if (!fits(view.row) || !fits(view.column) || !fits(view.tap))
    return std::string(name) + " has a stride of 2^31 or more";
  return "";
}

int second_taps(const Term& term) {
  return (term.height - term.first_height + 1) * (term.width - term.first_width + 1);
}

int first_taps(const Term& term) {
  return term.first_height * term.first_width;
}

bool scale_wanted(const Block& block, const Term& term) {
  return block.grad_scales.data != nullptr && term.scale >= 0;
}

// Forward, a tile holds all taps of its output channels, because most operands are shared by them. But where both
// factors of a composition are larger than 1x1, one tap at a time skips the zeros around each of them.
int taps_of_tile(const Block& block, bool backward) {
  const auto larger_first = [](const Term& term) { return term.kind == Kind::composed && first_taps(term) > 1; };
  return !backward && std::any_of(block.term, block.term + block.terms, larger_first) ? 1 : block.taps();
}

// Tiles of W: how many thread blocks the forward pass of a block takes.
std::int64_t kernel_tiles(const Block& block, const TileShape& tile, bool backward) {
  const int taps = taps_of_tile(block, backward), channels = std::max(tile.rows / taps, 1);
  return block.groups * (block.taps() / taps) * ceil_div(static_cast<int>(block.out_per_group()), channels) *
         ceil_div(static_cast<int>(block.in_per_group), tile.cols);
}

// Large tiles move less data, small ones spread little work wider and waste less of it on few channels.
bool large_tiles(const Block* const* blocks, int count, bool backward) {
  std::int64_t large = 0, small = 0;
  for (int i = 0; i < count; ++i) {
    if (blocks[i]->taps() > small_shape.rows) return true;
    large += kernel_tiles(*blocks[i], large_shape, backward);
    small += kernel_tiles(*blocks[i], small_shape, backward);
  }
  const std::int64_t large_area = large * large_shape.rows * large_shape.cols;
  const std::int64_t small_area = small * small_shape.rows * small_shape.cols;
  return large >= wanted_items / 2 && 10 * small_area >= 7 * large_area;
}

DeviceTerm compact(const Term& term) {
  DeviceTerm device{};
  device.a = compact(term.a);
  device.b = compact(term.b);
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

// Adds the backward work of one block: thread blocks, counters and places for partial sums.
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
    device.grad_a = compact(term.grad_a);
    device.grad_b = compact(term.grad_b);
    const bool scaled = scale_wanted(block_, term);
    sums_over_rows_ |= scaled;
    if (term.kind == Kind::composed) {
      if (term.grad_a.data != nullptr) add_first(term, device);
      if (term.grad_b.data != nullptr || scaled) {
        const int tiles = ceil_div(term.inner, tile_.cols);
        device.items_b = row_tiles_ * tiles;
        items_ += device.items_b;
        arrive(device, tiles, scaled);
      }
    } else if (term.kind == Kind::separable && term.b.data != nullptr) {
      if (term.grad_a.data != nullptr || term.grad_b.data != nullptr || scaled) add_separable(term, device, scaled);
    } else if (term.grad_a.data != nullptr || term.grad_b.data != nullptr || scaled) {
      elementwise_ = true;
      if (scaled) take_slots(device, column_tiles_);
      if (term.kind == Kind::pointwise && term.grad_b.data != nullptr) add_filter(term, device);
    }
  }

  // grad_a of a composed term: its depth, all (o, q), is split among thread blocks.
  void add_first(const Term& term, DeviceTerm& device) {
    const std::int64_t depth = static_cast<std::int64_t>(device_.out_per_group) * second_taps(term);
    const std::int64_t tiles =
        static_cast<std::int64_t>(device_.groups) * first_taps(term) * ceil_div(term.inner, tile_.rows) * column_tiles_;
    const std::int64_t splits = std::max<std::int64_t>(std::min((wanted_items + tiles - 1) / tiles, depth / 256), 1);
    const int each = ceil_div(static_cast<int>((depth + splits - 1) / splits), tile_.depth) * tile_.depth;
    device.splits = ceil_div(static_cast<int>(depth), each);
    device.items_a = static_cast<std::int32_t>(tiles * device.splits);
    items_ += device.items_a;
    if (device.splits == 1) return;
    device.counter = counters(tiles);
    device.partials = floats(static_cast<std::int64_t>(device.splits) * first_taps(term) * device_.groups * term.inner *
                             device_.in_per_group);
  }

  void add_separable(const Term& term, DeviceTerm& device, bool scaled) {
    const int spans = ceil_div(device_.channel_tiles, separable_span), passes = ceil_div(term.inner, separable_expand);
    device.items_b = device_.groups * spans * column_tiles_;
    items_ += device.items_b;
    arrive(device, column_tiles_, scaled, passes);
    if (term.grad_a.data == nullptr) return;
    device.counter = counters(static_cast<std::int64_t>(device_.groups) * column_tiles_);
    device.partials = floats(static_cast<std::int64_t>(spans) * device_.groups * device_.in_per_group * term.inner *
                             term.height * term.width);
  }

  // Filter gradients: sums over columns, and for a shared filter over all output channels too.
  void add_filter(const Term& term, DeviceTerm& device) {
    const int taps = term.height * term.width;
    sums_over_rows_ = true;
    shared_filter_ |= term.grad_b.row == 0 && device_.out_channels > 1;
    device.partials = floats((static_cast<std::int64_t>(column_tiles_) * device_.out_channels + row_tiles_) * taps);
  }

  void arrive(DeviceTerm& device, int tiles, bool scaled, int slots_each = 1) {
    arrivals_ += tiles;
    if (scaled) take_slots(device, tiles * slots_each);
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
  const TileShape& tile = schedule.large ? large_shape : small_shape;
  DeviceBlock device{};
  device.scales = compact(block.scales);
  device.grad_scales = compact(block.grad_scales);
  device.kernel = compact(block.kernel);
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
  // As few tiles as possible, and then all alike.
  device.channel_tiles = ceil_div(device.out_per_group, std::max(tile.rows / device.tile_taps, 1));
  device.tile_channels = ceil_div(device.out_per_group, device.channel_tiles);
  device.channel_tiles = ceil_div(device.out_per_group, device.tile_channels);
  for (int t = 0; t < block.terms; ++t) schedule.terms.push_back(compact(block.term[t]));
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

std::int64_t work(const Block& block) {
  std::int64_t depth = 1;
  for (int t = 0; t < block.terms; ++t)
    if (block.term[t].kind == Kind::composed)
      depth += static_cast<std::int64_t>(block.term[t].inner) * first_taps(block.term[t]);
  return depth;
}

}  // namespace

std::string why_not(const Block& block) {
  if (block.terms < 1 || block.terms > max_terms)
    return "a block must have 1 to " + std::to_string(max_terms) + " terms";
  if (block.taps() > max_taps) return "kernels of more than " + std::to_string(max_taps) + " taps are not covered";
  if (!fits(block.out_channels * block.taps() * 128) || !fits(block.in_per_group * block.groups * 128))
    return "too many channels";
  for (const auto& [view, name] :
       {std::pair{&block.scales, "scales"}, std::pair{&block.grad_scales, "scales' gradient"},
        std::pair{&block.kernel, "kernel"}})
    if (auto reason = why_not(*view, name); !reason.empty()) return reason;
  for (int t = 0; t < block.terms; ++t) {
    const Term& term = block.term[t];
    for (const auto& [view, name] : {std::pair{&term.a, "an operand"}, std::pair{&term.b, "an operand"},
                                     std::pair{&term.grad_a, "a gradient"}, std::pair{&term.grad_b, "a gradient"}})
      if (auto reason = why_not(*view, name); !reason.empty()) return reason;
  }
  return "";
}

std::vector<Schedule> schedule(const Block* blocks, int count, bool backward) {
  std::vector<const Block*> order(count);
  for (int i = 0; i < count; ++i) {
    if (auto reason = why_not(blocks[i]); !reason.empty()) throw std::invalid_argument(reason);
    order[i] = blocks + i;
  }
  std::stable_sort(order.begin(), order.end(), [](const Block* a, const Block* b) { return work(*a) > work(*b); });
  std::vector<Schedule> launches;
  for (int begin = 0, end = 0; begin < count; begin = end) {
    std::size_t bytes = 0;
    while (end < count) {
      bytes += sizeof(DeviceBlock) + order[end]->terms * sizeof(DeviceTerm);
      if (bytes > LargeTable::capacity) break;
      ++end;
    }
    Schedule& launch = launches.emplace_back();
    launch.large = large_tiles(&order[begin], end - begin, backward);
    for (int i = begin; i < end; ++i) add_block(launch, *order[i], backward);
  }
  return launches;
}

Needs needs(const Block* blocks, int count, bool backward) {
  // Whichever gradients are asked for later, this is enough: each adds to the work and none takes away.
  std::vector<Block> all(blocks, blocks + count);
  for (Block& block : all) {
    block.grad_scales = block.scales;
    for (Term& term : block.term) {
      term.grad_a = term.a;
      term.grad_b = term.b;
    }
  }
  Needs most;
  for (const Schedule& launch : schedule(all.data(), count, backward)) {
    most.workspace_bytes = std::max<std::int64_t>(most.workspace_bytes, launch.workspace_floats * sizeof(float));
    most.counter_bytes = std::max<std::int64_t>(most.counter_bytes, launch.counters * sizeof(std::int32_t));
  }
  return most;
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
