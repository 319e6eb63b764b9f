// Wrappers of the tensor-core instructions of sm_80 and later (PTX ISA, "Warp-level matrix instructions").
//
// clang-format off
// Fragments of lane l, with g = l / 4 and c = l % 4 (`2c..` stands for depths 2c and 2c + 1 in one register):
//   m16n8k8, TF32    A (g, c)    (g+8, c)    (g, c+4)     (g+8, c+4)       B (c, g)    (c+4, g)
//   m16n8k16, bf16   A (g, 2c..) (g+8, 2c..) (g, 2c+8..)  (g+8, 2c+8..)    B (2c.., g) (2c+8.., g)
//   both             C (g, 2c)   (g, 2c+1)   (g+8, 2c)    (g+8, 2c+1)
// clang-format on
#pragma once

#include "elements.cuh"

#if defined(OREPA_EMULATED)
#define OREPA_MMA OREPA_EMULATED_MMA
#elif !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define OREPA_MMA 1
#else
#define OREPA_MMA 0
#endif

namespace orepa::cuda {

#if OREPA_MMA

// d = a * b + c, truncated, not rounded.
__device__ __forceinline__ void mma_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                                         const float (&c)[4]) {
#ifdef OREPA_EMULATED
  emulator::mma_m16n8k8_tf32(d, a, b, c);
#else
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
#endif
}

__device__ __forceinline__ void mma_bfloat16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                                             const float (&c)[4]) {
#ifdef OREPA_EMULATED
  emulator::mma_m16n8k16_bfloat16(d, a, b, c);
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
#endif
}

// Round to nearest TF32: a float32 whose mantissa has 11 significant bits, the others zero.
__device__ __forceinline__ unsigned to_tf32(float value) {
#ifdef OREPA_EMULATED
  return emulator::to_tf32(value);
#else
  unsigned bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits & 0xffffe000u;
#endif
}

// Two bfloat16 in one register, the first in the low half.
__device__ __forceinline__ unsigned to_bfloat16_pair(float first, float second) {
#ifdef OREPA_EMULATED
  return float_to_bfloat16(first) | static_cast<unsigned>(float_to_bfloat16(second)) << 16;
#else
  unsigned bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
  return bits;
#endif
}

#endif  // OREPA_MMA

}  // namespace orepa::cuda
