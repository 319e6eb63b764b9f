// Sums over thread blocks, the same bits every time: each leaves its part in the workspace, and whoever comes last adds
// them all up in the order of their numbers.
#pragma once

#include "tile.cuh"

namespace orepa::cuda {

// Tells every thread whether its thread block is the last of `expected`; then what all others wrote can be read with
// `load_fresh`, and the counter is zero again.
template <class Tile>
__device__ __forceinline__ bool arrive_last(const Shared<Tile>& shared, std::int32_t* counter, int expected) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    const bool last = atomicAdd(counter, 1) == expected - 1;
    if (last) *counter = 0;
    *shared.flag() = last;
  }
  __syncthreads();
  const bool last = *shared.flag() != 0;
  if (last) __threadfence();
  __syncthreads();  // the flag is free for the next arrival
  return last;
}

// Past the first-level cache, which may hold a neighbour's part as it was before.
__device__ __forceinline__ float load_fresh(const float* address) {
  return __ldcg(address);
}

}  // namespace orepa::cuda
