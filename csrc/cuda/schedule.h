// Schedules of launches: what each thread block computes, and where partial sums go. Host code, without CUDA.
#pragma once

#include <algorithm>
#include <vector>

#include "api.h"
#include "kernel_params.h"
#include "tile_shape.h"

namespace orepa::cuda {

// One launch.
struct Schedule {
  bool large_tiles = true;
  std::vector<DeviceBlock> blocks;
  std::vector<DeviceTerm> terms;
  std::int64_t items = 0;  // thread blocks
  std::int64_t workspace_floats = 0, counters = 0;

  // Rounding a kernel to 16 bits, or the gradient of such a kernel, costs more than one product does.
  Products products(Precision precision) const {
    const auto is_exact = [](const DeviceBlock& block) { return block.kernel.type == Type::float32; };
    return precision == Precision::full && std::any_of(blocks.begin(), blocks.end(), is_exact) ? Products::three
                                                                                               : Products::one;
  }
  std::size_t bytes() const { return blocks.size() * sizeof(DeviceBlock) + terms.size() * sizeof(DeviceTerm); }
};

// Return as many launches as the blocks need, usually one. Blocks with most work come first in each, so that no long
// thread block starts last. Throws std::invalid_argument for unsupported blocks.
std::vector<Schedule> schedule(const Block* blocks, int count, bool backward);

// Throws std::invalid_argument if `context` has less memory than the launch needs.
void check_memory(const Schedule& schedule, const Context& context);

}  // namespace orepa::cuda
