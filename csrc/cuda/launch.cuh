// Kernel launches, and the parts of the CUDA runtime that the tests' emulator replaces.
#pragma once

#include <cuda_runtime.h>

#include <cstring>
#include <stdexcept>
#include <string>

#include "kernel_params.h"
#include "schedule.h"
#include "tile.cuh"

namespace orepa::cuda {

#ifdef OREPA_EMULATED
inline unsigned char* shared_memory() {
  return emulator::shared_memory();
}
#else
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}
#endif

inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // reset it: the error is reported here
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
}

// Makes a device current within a scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check_cuda(cudaGetDevice(&previous_), "cudaGetDevice");
    changed_ = previous_ != device;
    if (changed_) check_cuda(cudaSetDevice(device), "cudaSetDevice");
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

template <class Params>
void launch(void (*kernel)(Params), const Params& params, std::int64_t grid, int threads, int shared_bytes,
            std::uintptr_t stream) {
#ifdef OREPA_EMULATED
  (void)stream;
  emulator::launch([&] { kernel(params); }, static_cast<unsigned>(grid), threads, shared_bytes);
#else
  // More than 48 KB need this attribute. It is per device; setting it costs less than caching that it was set.
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
             "cudaFuncSetAttribute");
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = reinterpret_cast<cudaStream_t>(stream);
  check_cuda(cudaLaunchKernelEx(&config, kernel, params), "kernel launch");
#endif
}

template <class Squeeze, class Tile, class Params>
void launch_with(const Schedule& schedule, const Context& context) {
  Params params;
  params.workspace = static_cast<float*>(context.workspace);
  params.counters = static_cast<std::int32_t*>(context.counters);
  params.blocks = static_cast<std::int32_t>(schedule.blocks.size());
  params.first_term_byte = static_cast<std::int32_t>(schedule.blocks.size() * sizeof(DeviceBlock));
  std::memcpy(params.bytes, schedule.blocks.data(), params.first_term_byte);
  std::memcpy(params.bytes + params.first_term_byte, schedule.terms.data(), schedule.terms.size() * sizeof(DeviceTerm));
  const auto kernel = schedule.products(context.precision) == Products::one
                          ? Squeeze::template kernel<Tile, Params, Products::one>
                          : Squeeze::template kernel<Tile, Params, Products::three>;
  launch<Params>(kernel, params, schedule.items, Tile::threads, Tile::shared_bytes, context.stream);
}

// Launch `Squeeze::kernel` with the tile, the size of parameters and the products of a schedule.
template <class Squeeze>
void launch_schedule(const Schedule& schedule, const Context& context) {
  if (schedule.items == 0) return;
  check_memory(schedule, context);
  // Small parameters matter for the shortest launches only. Large tiles have no such kernel, which saves build time.
  if (schedule.large_tiles) return launch_with<Squeeze, LargeTile, LargeParams>(schedule, context);
  if (schedule.bytes() <= SmallParams::capacity) return launch_with<Squeeze, SmallTile, SmallParams>(schedule, context);
  launch_with<Squeeze, SmallTile, LargeParams>(schedule, context);
}

}  // namespace orepa::cuda
