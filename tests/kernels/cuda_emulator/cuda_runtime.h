// Replaces CUDA's header for a C++ compiler: the parts of the language and the runtime that csrc/cuda uses.
#pragma once

#include <algorithm>

#include "emulator.h"
#include "half.h"
#include "matrix.h"

#define OREPA_EMULATED
#ifndef OREPA_EMULATED_MMA
#define OREPA_EMULATED_MMA 1  // 0: a GPU without TF32
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

#define threadIdx (::emulator::machine.current->index)
#define blockIdx (::emulator::machine.block)
#define blockDim (::emulator::Index{::emulator::machine.block_threads, 1, 1})

using std::max;
using std::min;

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) {
  return {x, y};
}
inline float2 make_float2(float x, float y) {
  return {x, y};
}
inline float4 make_float4(float x, float y, float z, float w) {
  return {x, y, z, w};
}

inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<std::uint64_t>(a) * b >> 32);
}

template <class T>
T __ldg(const T* address) {
  if (reinterpret_cast<std::uintptr_t>(address) % sizeof(T) != 0) emulator::machine.fault("a misaligned load");
  T value;
  std::memcpy(&value, address, sizeof(T));  // GPU code may alias types, C++ may not
  return value;
}
inline float __ldcg(const float* address) {
  return *address;
}

inline void __syncthreads() {
  emulator::machine.yield(emulator::Wait::block);
}
inline int __syncthreads_or(int predicate) {
  emulator::machine.current->vote = predicate;
  __syncthreads();
  emulator::machine.current->vote = 0;
  return emulator::machine.vote;
}
inline void __syncwarp() {
  emulator::machine.yield(emulator::Wait::warp);
}
inline void __threadfence() {}
inline int atomicAdd(int* address, int value) {
  const int before = *address;
  *address += value;
  return before;
}
inline float __shfl_xor_sync(unsigned, float value, int mask) {
  const unsigned turn = emulator::exchange(value, emulator::Wait::shuffle);
  return emulator::message_of<float>(emulator::current_lane() ^ mask, turn);
}

using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
inline const char* cudaGetErrorName(cudaError_t) {
  return "error";
}
inline const char* cudaGetErrorString(cudaError_t) {
  return "emulated";
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = emulator::settings.driver;
  return cudaSuccess;
}
inline cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}
struct cudaFuncAttributes {};
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) {
  return emulator::settings.can_load ? cudaSuccess : 1;
}
inline cudaError_t cudaSetDevice(int) {
  return cudaSuccess;
}
