// Loops over the elements of one output channel, by the lanes of a warp: four elements per access where memory allows
// it, several accesses in flight, and no test of the type between them.
#pragma once

#include "tile.cuh"

namespace orepa::cuda {

// What a visitor does to a float, it does to a float4 as well.
__device__ __forceinline__ float4 operator*(float a, const float4& b) {
  return make_float4(a * b.x, a * b.y, a * b.z, a * b.w);
}
__device__ __forceinline__ void operator+=(float4& a, const float4& b) {
  a = make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}
__device__ __forceinline__ float dot(float a, float b) {
  return a * b;
}
__device__ __forceinline__ float dot(const float4& a, const float4& b) {
  return a.x * b.x + a.y * b.y + (a.z * b.z + a.w * b.w);
}
template <class Value>
__device__ __forceinline__ Value& as(float* shared) {
  return *reinterpret_cast<Value*>(shared);
}

// The bits of four adjacent elements, aligned.
__device__ __forceinline__ uint4 load_bits(const DeviceView& view, std::int64_t offset) {
  if (view.type == Type::float32)
    return __ldg(reinterpret_cast<const uint4*>(reinterpret_cast<const float*>(view.data) + offset));
  const uint2 half = __ldg(reinterpret_cast<const uint2*>(reinterpret_cast<const Bits16*>(view.data) + offset));
  return {half.x, half.y, 0, 0};
}
__device__ __forceinline__ float4 widen(const uint4& bits, Type type) {
  if (type == Type::float32)
    return make_float4(__uint_as_float(bits.x), __uint_as_float(bits.y), __uint_as_float(bits.z),
                       __uint_as_float(bits.w));
  return make_float4(widen(bits.x & 0xffffu, type), widen(bits.x >> 16, type), widen(bits.y & 0xffffu, type),
                     widen(bits.y >> 16, type));
}

__device__ __forceinline__ bool quads_aligned(const DeviceView& view, std::int64_t start, int count) {
  const std::uintptr_t bytes = view.type == Type::float32 ? 15 : 7;
  return (reinterpret_cast<std::uintptr_t>(view.data) & bytes) == 0 && start % 4 == 0 && count % 4 == 0;
}
// Return whether four adjacent columns can be accessed at once, at every tap.
__device__ __forceinline__ bool has_column_quads(const DeviceView& view, std::int64_t start, int columns, int taps) {
  return view.column == 1 && (view.tap % 4 == 0 || taps == 1) && quads_aligned(view, start, columns);
}

// Load `Batch` quads per lane before the first is used: visit(i, quad) for i < count, which lies at `offset(i)`.
template <int Batch, class Offset, class Visit>
__device__ __forceinline__ void load_quads(const DeviceView& view, int count, const Offset& offset,
                                           const Visit& visit) {
#pragma unroll 1
  for (int first = lane_index(); first < count; first += Batch * warp_size) {
    uint4 bits[Batch];
#pragma unroll
    for (int i = 0; i < Batch; ++i) {
      const int index = first + i * warp_size;
      if (index < count) bits[i] = load_bits(view, offset(index));
    }
#pragma unroll
    for (int i = 0; i < Batch; ++i)
      if (first + i * warp_size < count) visit(first + i * warp_size, widen(bits[i], view.type));
  }
}

// Call visit(column, tap, value), with values of one column or (float4) of four from `column` on. The elements are
// those at `start`, in a view that has tap `tap_of(tap)` for `tap`.
template <int Batch = 3, class TapOf, class Visit>
__device__ __forceinline__ void read_elements(const DeviceView& view, std::int64_t start, int columns, int taps,
                                              const TapOf& tap_of, const Visit& visit) {
  const auto at_tap = [&](int column, int tap) { return start + at(view, 0, column, tap_of(tap)); };
  if (has_column_quads(view, start, columns, taps)) {
    const FastDivider quads(columns / 4);
    load_quads<Batch>(
        view, columns / 4 * taps, [&](int i) { return at_tap(quads.remainder(i) * 4, quads.quotient(i)); },
        [&](int i, const float4& four) { visit(quads.remainder(i) * 4, quads.quotient(i), four); });
    return;
  }
  const bool along_taps = view.column != 1 && view.tap == 1;  // innermost, as in contiguous tensors
  const int count = columns * taps, inner = along_taps ? taps : columns;
  const FastDivider divider(inner);
#pragma unroll 1
  for (int index = lane_index(); index < count; index += warp_size) {
    const int outer = divider.quotient(index), rest = index - outer * inner;
    const int column = along_taps ? outer : rest, tap = along_taps ? rest : outer;
    visit(column, tap, load(view, at_tap(column, tap)));
  }
}

// Store `get(column, tap)`, a float, or its four columns from `column` on, a float4: `get` gets a value of that type.
template <class Get>
__device__ __forceinline__ void write_elements(const DeviceView& view, std::int64_t start, int columns, int taps,
                                               const Get& get) {
  const bool quads = has_column_quads(view, start, columns, taps);
  const bool along_taps = !quads && view.column != 1 && view.tap == 1;
  const int across = quads ? columns / 4 : columns, inner = along_taps ? taps : across, count = across * taps;
  const FastDivider divider(inner);
#pragma unroll 1
  for (int index = lane_index(); index < count; index += warp_size) {
    const int outer = divider.quotient(index), rest = index - outer * inner;
    const int column = along_taps ? outer : rest, tap = along_taps ? rest : outer;
    if (quads) {
      store_quad(view, start + at(view, 0, 4 * column, tap), get(4 * column, tap, float4{}));
    } else {
      store(view, start + at(view, 0, column, tap), get(column, tap, 0.0f));
    }
  }
}

}  // namespace orepa::cuda
