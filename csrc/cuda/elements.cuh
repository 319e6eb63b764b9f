// Loads and stores of elements of any floating type as float32.
#pragma once

#include <cuda_runtime.h>

#include "kernel_params.h"

namespace orepa::cuda {

using Bits16 = unsigned short;

__device__ __forceinline__ float bfloat16_to_float(unsigned bits) {
  return __uint_as_float(bits << 16);
}

// Round to nearest even. sm_75 has no instruction for it.
__device__ __forceinline__ Bits16 float_to_bfloat16(float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  Bits16 bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
#else
  const unsigned bits = __float_as_uint(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;  // NaN
  return static_cast<Bits16>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
#endif
}

__device__ __forceinline__ float float16_to_float(Bits16 bits) {
#ifdef OREPA_EMULATED
  return emulator::half_to_float(bits);
#else
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
#endif
}

__device__ __forceinline__ Bits16 float_to_float16(float value) {
#ifdef OREPA_EMULATED
  return emulator::float_to_half(value);
#else
  Bits16 bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
#endif
}

__device__ __forceinline__ float widen(unsigned bits, Type type) {
  if (type == Type::float32) return __uint_as_float(bits);
  return type == Type::bfloat16 ? bfloat16_to_float(bits) : float16_to_float(static_cast<Bits16>(bits));
}

__device__ __forceinline__ std::int64_t at(const DeviceView& view, int row, int column, int tap) {
  return static_cast<std::int64_t>(row) * view.row + static_cast<std::int64_t>(column) * view.column +
         static_cast<std::int64_t>(tap) * view.tap;
}

__device__ __forceinline__ float load(const DeviceView& view, std::int64_t offset) {
  if (view.type == Type::float32) return __ldg(reinterpret_cast<const float*>(view.data) + offset);
  return widen(__ldg(reinterpret_cast<const Bits16*>(view.data) + offset), view.type);
}

__device__ __forceinline__ float load(const DeviceView& view, int row, int column, int tap) {
  return load(view, at(view, row, column, tap));
}

__device__ __forceinline__ void store(const DeviceView& view, std::int64_t offset, float value) {
  if (view.type == Type::float32) {
    reinterpret_cast<float*>(view.data)[offset] = value;
  } else {
    const Bits16 bits = view.type == Type::bfloat16 ? float_to_bfloat16(value) : float_to_float16(value);
    reinterpret_cast<Bits16*>(view.data)[offset] = bits;
  }
}

__device__ __forceinline__ void store(const DeviceView& view, int row, int column, int tap, float value) {
  store(view, at(view, row, column, tap), value);
}

// Four adjacent elements, aligned.
__device__ __forceinline__ void store_quad(const DeviceView& view, std::int64_t offset, const float4& value) {
  if (view.type == Type::float32) {
    *reinterpret_cast<float4*>(reinterpret_cast<float*>(view.data) + offset) = value;
    return;
  }
  const auto pair = [&](float first, float second) {
    return view.type == Type::bfloat16
               ? float_to_bfloat16(first) | static_cast<unsigned>(float_to_bfloat16(second)) << 16
               : float_to_float16(first) | static_cast<unsigned>(float_to_float16(second)) << 16;
  };
  *reinterpret_cast<uint2*>(reinterpret_cast<Bits16*>(view.data) + offset) =
      make_uint2(pair(value.x, value.y), pair(value.z, value.w));
}

// Division of non-negative integers by a runtime constant, as a multiplication: exact if numerator * divisor < 2^32.
class FastDivider {
 public:
  __device__ __forceinline__ explicit FastDivider(int divisor)
      : divisor_(divisor), magic_(divisor > 1 ? 0xffffffffu / static_cast<unsigned>(divisor) + 1 : 0) {}
  __device__ __forceinline__ int quotient(int value) const {
    return divisor_ == 1 ? value : static_cast<int>(__umulhi(static_cast<unsigned>(value), magic_));
  }
  __device__ __forceinline__ int remainder(int value) const { return value - quotient(value) * divisor_; }

 private:
  int divisor_;
  unsigned magic_;
};

}  // namespace orepa::cuda
