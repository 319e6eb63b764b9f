// Copies from global to shared memory: asynchronous for float32 elements from sm_80 on.
#pragma once

#include "elements.cuh"

namespace orepa::cuda {

// Copy `Bytes` bytes, or write zeros if not `inside`; `from` must be a valid address in either case.
template <int Bytes>
__device__ __forceinline__ void copy_async(float* to, const void* from, bool inside) {
#if defined(OREPA_EMULATED)
  emulator::copy_async(to, from, Bytes, inside);
#elif !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  const int bytes = inside ? Bytes : 0;
  if constexpr (Bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(from), "n"(Bytes), "r"(bytes)
                 : "memory");
  }
#else
  if constexpr (Bytes == 16) {
    *reinterpret_cast<float4*>(to) =
        inside ? __ldg(reinterpret_cast<const float4*>(from)) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  } else {
    *to = inside ? __ldg(reinterpret_cast<const float*>(from)) : 0.0f;
  }
#endif
}

// Wait for this thread's copies; other threads see them after a barrier.
__device__ __forceinline__ void wait_for_copies() {
#if defined(OREPA_EMULATED)
  emulator::wait_for_copies();
#elif !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// Copy the element at `offset`, or write zero if `offset` is negative.
__device__ __forceinline__ void copy_element(float* to, const unsigned char* data, std::int64_t offset, Type type) {
  const bool inside = offset >= 0;
  if (type == Type::float32) {
    copy_async<4>(to, reinterpret_cast<const float*>(data) + (inside ? offset : 0), inside);
  } else {
    *to = inside ? widen(__ldg(reinterpret_cast<const Bits16*>(data) + offset), type) : 0.0f;
  }
}

}  // namespace orepa::cuda
