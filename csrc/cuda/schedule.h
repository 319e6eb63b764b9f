// What a launch consists of: which thread block does what, and where partial sums go. Host code, without CUDA.
#pragma once

#include <vector>

#include "api.h"
#include "kernel_params.h"
#include "tile_shape.h"

namespace orepa::cuda {

struct Schedule {
  bool large = true;  // which tile
  std::vector<DeviceBlock> blocks;
  std::vector<DeviceTerm> terms;
  std::int64_t items = 0;  // thread blocks
  std::int64_t workspace_floats = 0, counters = 0;

  std::size_t bytes() const { return blocks.size() * sizeof(DeviceBlock) + terms.size() * sizeof(DeviceTerm); }
};

// As many launches as it takes, usually one; those with most work first in each, so that none of it comes last.
// Throws std::invalid_argument where `why_not` has a reason.
std::vector<Schedule> schedule(const Block* blocks, int count, bool backward);

// Throws std::invalid_argument where `context` has less memory than a launch needs.
void check_memory(const Schedule& schedule, const Context& context);

}  // namespace orepa::cuda
