// IEEE half precision in software, rounded to nearest even.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace emulator {

inline float half_to_float(unsigned short bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  float value = exponent == 0    ? std::ldexp(static_cast<float>(mantissa), -24)
                : exponent == 31 ? (mantissa != 0 ? NAN : INFINITY)
                                 : std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
  return bits & 0x8000 ? -value : value;
}

inline unsigned short float_to_half(float value) {
  const unsigned short sign = std::signbit(value) ? 0x8000 : 0;
  const float size = std::fabs(value);
  if (std::isnan(value)) return 0x7fff;
  if (size >= 65520.0f) return sign | 0x7c00;
  if (size == 0.0f) return sign;
  int exponent = 0;
  std::frexp(size, &exponent);                                 // size = 0.5..1 * 2^exponent
  const int scale = exponent < -13 ? -24 : exponent - 11;      // exponent of a half's last bit here
  const long mantissa = std::lrint(std::ldexp(size, -scale));  // rounds to nearest even, the default mode
  if (exponent < -13) return static_cast<unsigned short>(sign | mantissa);
  return static_cast<unsigned short>(sign | (((scale + 25) << 10) + (mantissa - 1024)));
}

}  // namespace emulator
