// Deterministic sums over thread blocks: each writes its partial sum to the workspace, and the last one to arrive adds
// all of them up in index order.
#pragma once

#include "tile.cuh"

namespace orepa::cuda {

// Return, to every thread, whether its thread block is the last of `expected` to arrive. If so, all others' writes are
// visible to `load_l2`, and the counter is reset to zero.
template <class Tile>
__device__ __forceinline__ bool arrive_last(const SharedMemory<Tile>& shared, std::int32_t* counter, int expected) {
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
  __syncthreads();  // before the flag is reused
  return last;
}

// Bypasses the first-level cache, which may hold stale data.
__device__ __forceinline__ float load_l2(const float* address) {
  return __ldcg(address);
}

}  // namespace orepa::cuda
