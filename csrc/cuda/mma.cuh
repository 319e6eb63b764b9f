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

// Four 8 x 4 matrices of 32-bit elements: lanes 8i to 8i + 7 pass the addresses of matrix i's lines, each 16-byte
// aligned, and lane l gets element (l / 4, l % 4) of each.
__device__ __forceinline__ void load_matrices(float (&d)[4], const float* line) {
#ifdef OREPA_EMULATED
  emulator::load_matrices(d, line);
#else
  unsigned bits[4];
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(bits[0]), "=r"(bits[1]), "=r"(bits[2]), "=r"(bits[3])
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(line)))
               : "memory");
#pragma unroll
  for (int i = 0; i < 4; ++i) d[i] = __uint_as_float(bits[i]);
#endif
}

// Round to nearest TF32, as a float32 whose last 13 bits mean nothing. One instruction from sm_90 on, three before.
__device__ __forceinline__ unsigned to_tf32(float value) {
#ifdef OREPA_EMULATED
  return emulator::to_tf32(value);
#else
  unsigned bits;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm("cvt.rn.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
#else
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
#endif
  return bits;
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
