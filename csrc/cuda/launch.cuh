// Launching, and the few things of the CUDA runtime that the emulator of the tests replaces.
#pragma once

#include <cuda_runtime.h>

#include <cstring>
#include <stdexcept>
#include <string>

#include "kernel_params.h"
#include "schedule.h"

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

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // not left behind for somebody else to find
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
}

// Makes a device current for as long as this lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    changed_ = before_ != device;
    if (changed_) check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

template <class Table>
void launch(void (*kernel)(Table), const Table& table, std::int64_t grid, int threads, int shared_bytes,
            std::uintptr_t stream) {
#ifdef OREPA_EMULATED
  (void)stream;
  emulator::launch([&] { kernel(table); }, static_cast<unsigned>(grid), threads, shared_bytes);
#else
  // Beyond 48 KB only on request, which each device remembers and which costs less than remembering it here.
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
        "cudaFuncSetAttribute");
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = reinterpret_cast<cudaStream_t>(stream);
  check(cudaLaunchKernelEx(&config, kernel, table), "kernel launch");
#endif
}

template <class T>
struct Tag {
  using type = T;
};

template <class Tile, class Table, class Select>
void launch_with(const Schedule& schedule, const Context& context, const Select& select) {
  Table table;
  table.workspace = static_cast<float*>(context.workspace);
  table.counters = static_cast<std::int32_t*>(context.counters);
  table.blocks = static_cast<std::int32_t>(schedule.blocks.size());
  table.first_term_byte = static_cast<std::int32_t>(schedule.blocks.size() * sizeof(DeviceBlock));
  table.full = context.precision == Precision::full;
  std::memcpy(table.bytes, schedule.blocks.data(), table.first_term_byte);
  std::memcpy(table.bytes + table.first_term_byte, schedule.terms.data(), schedule.terms.size() * sizeof(DeviceTerm));
  launch<Table>(select(Tag<Tile>{}, Tag<Table>{}), table, schedule.items, Tile::threads, Tile::shared_bytes,
                context.stream);
}

// Launches `select(tile, table)`, a kernel for the tile and the size of table that a schedule wants.
template <class Large, class Small, class Select>
void launch_schedule(const Schedule& schedule, const Context& context, const Select& select) {
  if (schedule.items == 0) return;
  check_memory(schedule, context);
  // A small table is for a launch that takes no longer than its parameters do. Not for large tiles: kernels cost build
  // time.
  if (schedule.large) return launch_with<Large, LargeTable>(schedule, context, select);
  if (schedule.bytes() <= SmallTable::capacity) return launch_with<Small, SmallTable>(schedule, context, select);
  launch_with<Small, LargeTable>(schedule, context, select);
}

}  // namespace orepa::cuda
