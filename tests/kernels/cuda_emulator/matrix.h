// The warp-level matrix instructions that the kernels use, with the fragment layouts of the PTX ISA.
#pragma once

#include <cmath>

#include "emulator.h"

namespace emulator {

// Tensor cores truncate sums to float32 instead of rounding them.
inline float truncate(double exact) {
  float value = static_cast<float>(exact);
  if (std::isfinite(value) && std::fabs(static_cast<double>(value)) > std::fabs(exact))
    value = std::nextafter(value, 0.0f);
  return value;
}

inline float float_from(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

struct Fragments {
  unsigned a[4], b[2];
};

// Both instructions; `value(register, part)` is one of the values in a register. A hardware step adds the products of
// four TF32 or eight bfloat16 depths to the sum and truncates it (Fasi et al. 2021, on an A100).
template <int PerRegister, class Value>
void mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], const float (&c)[4], const Value& value) {
  const unsigned turn = exchange(Fragments{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}}, Wait::matrix_product);
  const int group = current_lane() / 4, pair = current_lane() % 4;
  float sum[4] = {c[0], c[1], c[2], c[3]};
  for (int step = 0; step < 2; ++step) {
    double exact[4] = {sum[0], sum[1], sum[2], sum[3]};
    for (int lane = 0; lane < 4; ++lane) {  // each holds a quarter of the depths
      const Fragments row = message_of<Fragments>(4 * group + lane, turn);
      const Fragments columns[2] = {message_of<Fragments>(4 * (2 * pair) + lane, turn),
                                    message_of<Fragments>(4 * (2 * pair + 1) + lane, turn)};
      for (int part = 0; part < PerRegister; ++part)
        for (int k = 0; k < 4; ++k)
          exact[k] += static_cast<double>(value(row.a[2 * step + k / 2], part)) * value(columns[k % 2].b[step], part);
    }
    for (int k = 0; k < 4; ++k) sum[k] = truncate(exact[k]);
  }
  for (int k = 0; k < 4; ++k) d[k] = sum[k];
}

inline void mma_m16n8k16_bfloat16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], const float (&c)[4]) {
  mma<2>(d, a, b, c, [](unsigned bits, int half) { return float_from((bits >> (16 * half)) << 16); });
}

// Tensor cores ignore the last 13 bits.
inline void mma_m16n8k8_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], const float (&c)[4]) {
  mma<1>(d, a, b, c, [](unsigned bits, int) { return float_from(bits & 0xffffe000u); });
}

// ldmatrix.x4, with 32-bit elements for pairs of 16-bit ones
inline void load_matrices(float (&d)[4], const float* line) {
  if (reinterpret_cast<std::uintptr_t>(line) % 16 != 0) machine.fault("a misaligned matrix");
  const unsigned turn = exchange(line, Wait::matrix_load);
  const int lane = current_lane();
  for (int i = 0; i < 4; ++i) d[i] = message_of<const float*>(8 * i + lane / 4, turn)[lane % 4];
}

// cvt.rna: to nearest, ties away from zero
inline unsigned to_tf32(float value) {
  if (std::isnan(value)) return 0x7fffe000u;
  unsigned bits;
  std::memcpy(&bits, &value, 4);
  return std::isinf(value) ? bits : (bits + 0x1000u) & 0xffffe000u;
}

}  // namespace emulator
