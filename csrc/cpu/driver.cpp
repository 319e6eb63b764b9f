// Threads, memory and the order of sums: what surrounds the kernels of isa/kernels.h.
#include <algorithm>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#include "api.h"
#include "huge_pages.h"
#include "isa/kernels.h"
#include "parallel.h"
#include "sizes.h"

namespace orepa::cpu {

// --- sizes ----------------------------------------------------------------------------------------------------------

static bool has_pointwise(const Term& term) {
  return term.kind == Kind::separable && term.b.data != nullptr;
}

// Input channels of separable terms, in whole vectors.
template <class T>
static std::int64_t padded_channels(const Block& block) {
  return round_up(block.in_per_group, kernels<T>().vector_width);
}

// Columns of a product's right matrix.
template <class T>
static std::int64_t padded(std::int64_t width) {
  return round_up(width, kernels<T>().tile_width);
}

template <class T>
static std::int64_t depthwise_size(const Block& block, const Term& term) {
  return term.taps() * term.inner * padded_channels<T>(block);
}

// Scratch memory for `channel_block` output channels: their panels, products (forward) or their gradients (backward),
// and copies of operands; of all terms together for forward, three times those of the largest term for backward.
template <class T>
static std::int64_t scratch_size(const Block& block) {
  const std::int64_t columns = padded_channels<T>(block), panel = columns * block.taps();
  std::int64_t products = 0, copies = 0, largest_copy = 0, per_channel = 0;
  for (std::int32_t index = 0; index < block.terms; ++index) {
    const Term& term = block.term[index];
    std::int64_t copy = term.kind == Kind::pointwise ? columns : panel;
    if (term.kind == Kind::composed) {
      const std::int64_t width = columns_of_first(block, term);
      copy = term.second_taps() * std::max<std::int64_t>(term.inner, width);
      products += term.second_taps() * (padded<T>(width) + padded<T>(term.inner));
      per_channel = std::max(per_channel, copy);
    }
    if (has_pointwise(term)) per_channel = std::max(per_channel, 2 * term.inner * columns + 16 * term.taps());
    copies += copy;
    largest_copy = std::max(largest_copy, copy);
  }
  return channel_block * (panel + products + per_channel) + copies + 3 * largest_copy;
}

// --- ranges of output channels --------------------------------------------------------------------------------------

// [begin, end)
using Ranges = std::vector<std::pair<std::int64_t, std::int64_t>>;

// Sums over output channels are computed per slice of this length; then the slices are added up in order. Enough slices
// for 16 threads, but not so short that adding them up takes as long as computing them.
static std::int64_t slice_length(const Block& block) {
  constexpr std::int64_t least = 4 * channel_block;
  return std::max<std::int64_t>((block.out_per_group() / 16 + least - 1) / least, 1) * least;
}

// Backward processes chunks with this many elements of dW per thread (256 KB in float32): they and as much of b are
// still in the second-level caches for the product that is the gradient of a. Results do not depend on the size of
// chunks, because chunks begin where slices and partial sums begin.
constexpr std::int64_t chunk_elements = 1 << 16;

static Ranges chunks_of(const Block& block, int threads) {
  const std::int64_t group = block.out_per_group(), slice = slice_length(block);
  std::int64_t row = block.taps() * block.in_per_group, unit = slice;
  for (std::int32_t index = 0; index < block.terms; ++index) {
    const Term& term = block.term[index];
    if (term.kind != Kind::composed) continue;
    row = std::max(row, term.second_taps() * std::max<std::int64_t>(term.inner, columns_of_first(block, term)));
    while (unit % channels_per_partial_sum(term.second_taps()) != 0) unit += slice;
  }
  std::int64_t shared = unit;  // as many slices for each thread
  while (shared % (threads * slice) != 0) shared += unit;
  const std::int64_t rows = std::max(shared, threads * chunk_elements / row);
  const std::int64_t entire_groups = rows / group * group;  // channels of the groups that fit
  const std::int64_t step = entire_groups > 0 ? entire_groups : rows / shared * shared;
  const std::int64_t extent = entire_groups > 0 ? block.out_channels : group;
  Ranges chunks;
  for (std::int64_t first = 0; first < block.out_channels; first += extent)
    for (std::int64_t begin = first; begin < first + extent; begin += step)
      chunks.emplace_back(begin, std::min(begin + step, first + extent));
  return chunks;
}

// The slices of a chunk. Slices of a group are the same, whether the chunk has all of the group or a part.
static Ranges slices_of(const Block& block, std::int64_t begin, std::int64_t end) {
  const std::int64_t slice = slice_length(block), group = block.out_per_group();
  Ranges slices;
  for (std::int64_t first = begin; first < end; first = slices.back().second)
    slices.emplace_back(first, std::min({first + slice, (first / group + 1) * group, end}));
  return slices;
}

// --- memory ---------------------------------------------------------------------------------------------------------

enum Buffer {
  scratch_buffer,
  depthwise_buffer,
  first_buffer,
  depthwise_sums_buffer,
  filter_gradients_buffer,
  chunk_buffer,
  first_sums_buffer
};

// Return uninitialized memory of this thread, which the next call reuses: fresh pages cost more than the computations
// in them. It is aligned to a cache line: loading a vector across two lines takes twice as long.
template <class T, Buffer buffer>
static T* thread_buffer(std::int64_t size) {
  constexpr std::size_t line = 64;
  static thread_local std::vector<T> memory;
  const std::size_t elements = static_cast<std::size_t>(size) + line / sizeof(T);
  if (memory.size() < elements) memory.resize(elements);
  void* begin = memory.data();
  std::size_t space = memory.size() * sizeof(T);
  return static_cast<T*>(std::align(line, space - line, begin, space));
}

template <class T>
static Packed<T> pack(const Block& block, bool for_backward, int threads) {
  std::int64_t depthwise_elements = 0, first_elements = 0;
  const auto depth = [&](const Term& term) { return for_backward ? columns_of_first(block, term) : term.inner; };
  const auto width = [&](const Term& term) {
    return padded<T>(for_backward ? term.inner : columns_of_first(block, term));
  };
  for (std::int32_t index = 0; index < block.terms; ++index) {
    const Term& term = block.term[index];
    if (has_pointwise(term)) depthwise_elements += block.groups * depthwise_size<T>(block, term);
    if (term.kind == Kind::composed) first_elements += block.groups * depth(term) * width(term);
  }
  T* depthwise = thread_buffer<T, depthwise_buffer>(depthwise_elements);
  T* first = thread_buffer<T, first_buffer>(first_elements);
  Packed<T> packed;
  for (std::int32_t index = 0; index < block.terms; ++index) {
    const Term& term = block.term[index];
    if (has_pointwise(term)) {
      const std::int64_t size = depthwise_size<T>(block, term);
      const std::int64_t tiles = padded_channels<T>(block) / kernels<T>().vector_width;
      parallel_group_rows(block.groups, tiles, size / tiles, threads,
                          [&](std::int64_t group, std::int64_t begin, std::int64_t end) {
                            kernels<T>().pack_depthwise(block, term, group, depthwise + group * size, begin, end);
                          });
      packed.depthwise[index] = depthwise;
      depthwise += block.groups * size;
    } else if (term.kind == Kind::composed) {
      const std::int64_t size = depth(term) * width(term), tiles = width(term) / kernels<T>().tile_width;
      parallel_group_rows(block.groups, tiles, size / tiles, threads,
                          [&](std::int64_t group, std::int64_t begin, std::int64_t end) {
                            kernels<T>().pack_first(block, term, group, for_backward, first + group * size, begin, end);
                          });
      packed.first[index] = first;
      first += block.groups * size;
    }
  }
  return packed;
}

// --- gradients that are sums over output channels -------------------------------------------------------------------

// Gradients of depthwise kernels, one group at a time: a sum per slice, and the sum of the slices in order.
template <class T>
class DepthwiseGradients {
 public:
  DepthwiseGradients(const Block& block, std::int64_t max_slices) : block_(block) {
    for (std::int32_t index = 0; index < block.terms; ++index) {
      const Term& term = block.term[index];
      if (has_pointwise(term) && term.grad_a.data != nullptr) size_[index] = depthwise_size<T>(block, term);
      total_size_ += size_[index];
    }
    total_ = thread_buffer<T, depthwise_sums_buffer>((1 + max_slices) * total_size_);
    slices_ = total_ + total_size_;
  }

  void clear(std::int64_t slices) { std::fill(slices_, slices_ + slices * total_size_, T{0}); }

  void point_to(std::int64_t slice, ChannelSums<T>& sums) const {
    T* next = slices_ + slice * total_size_;
    for (std::int32_t index = 0; index < max_terms; next += size_[index++])
      sums.depthwise[index] = size_[index] > 0 ? next : nullptr;
  }

  // Add the sums of a chunk's slices, and store the gradients of each group that is complete.
  void add(const Ranges& slices) {
    if (total_size_ == 0) return;
    const std::int64_t group = block_.out_per_group(), count = static_cast<std::int64_t>(slices.size());
    for (std::int64_t slice = 0; slice < count; ++slice) {
      if (slices[slice].first % group == 0) std::fill(total_, total_ + total_size_, T{0});
      const T* const sums = slices_ + slice * total_size_;
      for (std::int64_t i = 0; i < total_size_; ++i) total_[i] += sums[i];
      if (slices[slice].second % group == 0) store(slices[slice].first / group);
    }
  }

 private:
  void store(std::int64_t group) const {
    const T* next = total_;
    for (std::int32_t index = 0; index < block_.terms; next += size_[index++])
      if (size_[index] > 0) kernels<T>().unpack_depthwise(block_, block_.term[index], group, next);
  }

  const Block& block_;
  std::int64_t size_[max_terms] = {}, total_size_ = 0;
  T *total_ = nullptr, *slices_ = nullptr;
};

// Gradients of filters: a row per output channel, and their sum where all output channels share one filter.
template <class T>
class FilterGradients {
 public:
  explicit FilterGradients(const Block& block) : block_(block) {
    std::int64_t elements = 0;
    each([&](std::int32_t, const Term& term) { elements += block.out_channels * term.taps(); });
    T* next = thread_buffer<T, filter_gradients_buffer>(elements);
    each([&](std::int32_t index, const Term& term) {
      rows_[index] = next;
      next += block.out_channels * term.taps();
    });
  }

  void point_to(ChannelSums<T>& sums) const { std::copy(rows_, rows_ + max_terms, sums.filters); }

  void store() const {
    each([&](std::int32_t index, const Term& term) {
      T* const rows = rows_[index];
      const std::int64_t filters = term.grad_b.row == 0 ? 1 : block_.out_channels, taps = term.taps();
      if (filters == 1)
        for (std::int64_t o = 1; o < block_.out_channels; ++o)
          for (std::int64_t t = 0; t < taps; ++t) rows[t] += rows[o * taps + t];
      const View taps_as_columns = {term.grad_b.data, term.grad_b.row, term.grad_b.tap, 0, term.grad_b.type};
      kernels<T>().unpack(rows, taps, 1, taps_as_columns, 0, filters);
    });
  }

 private:
  template <class F>
  void each(F f) const {
    for (std::int32_t index = 0; index < block_.terms; ++index) {
      const Term& term = block_.term[index];
      if (term.kind == Kind::pointwise && term.grad_b.data != nullptr) f(index, term);
    }
  }

  const Block& block_;
  T* rows_[max_terms] = {};
};

// Gradients of the first factors a of composed terms: the sum of all chunks' products, group by group.
template <class T>
class FirstGradients {
 public:
  FirstGradients(const Block& block, std::int64_t max_rows) : block_(block) {
    std::int64_t total_elements = 0, chunk_elements = 0;
    each([&](std::int32_t, const Term& term) {
      total_elements += block_.groups * group_size(term);
      chunk_elements += max_rows * (im2col_row(term) + second_row(term));
    });
    T* total = thread_buffer<T, first_sums_buffer>(total_elements);
    T* buffer = thread_buffer<T, chunk_buffer>(chunk_elements);
    each([&](std::int32_t index, const Term& term) {
      totals_[index] = total;
      total += block_.groups * group_size(term);
      chunk.im2col[index] = buffer;
      buffer += max_rows * im2col_row(term);
      if (second_row(term) > 0) chunk.second[index] = buffer;
      buffer += max_rows * second_row(term);
    });
  }

  // Add the product of the current chunk.
  void add_chunk(int threads) {
    const std::int64_t rows = block_.out_per_group();
    const std::int64_t first_group = chunk.begin / rows, groups = (chunk.end - 1) / rows + 1 - first_group;
    each([&](std::int32_t index, const Term& term) {
      const std::int64_t elements = (chunk.end - chunk.begin) / groups * im2col_row(term);
      parallel_group_rows(
          groups, term.inner, elements, threads, [&](std::int64_t number, std::int64_t begin, std::int64_t end) {
            const std::int64_t group = first_group + number;
            const bool accumulate = group * rows < chunk.begin;
            kernels<T>().first_gradient(block_, chunk, index, group, total(index, group), accumulate, begin, end);
          });
    });
  }

  void store(int threads) const {
    each([&](std::int32_t index, const Term& term) {
      parallel_group_rows(block_.groups, term.inner, columns_of_first(block_, term), threads,
                          [&](std::int64_t group, std::int64_t begin, std::int64_t end) {
                            kernels<T>().unpack_first(block_, term, group, total(index, group), begin, end);
                          });
    });
  }

  Chunk<T> chunk;

 private:
  template <class F>
  void each(F f) const {
    for (std::int32_t index = 0; index < block_.terms; ++index) {
      const Term& term = block_.term[index];
      if (term.kind == Kind::composed && term.grad_a.data != nullptr) f(index, term);
    }
  }

  std::int64_t group_size(const Term& term) const { return term.inner * padded<T>(columns_of_first(block_, term)); }
  std::int64_t im2col_row(const Term& term) const {
    return term.second_taps() * padded<T>(columns_of_first(block_, term));
  }
  std::int64_t second_row(const Term& term) const {
    return term.b.type == type_of<T> ? 0 : term.second_taps() * term.inner;
  }
  T* total(std::int32_t index, std::int64_t group) const {
    return totals_[index] + group * group_size(block_.term[index]);
  }

  const Block& block_;
  T* totals_[max_terms] = {};
};

// --- forward and backward -------------------------------------------------------------------------------------------

// Call f with a pointer to the type to compute in.
template <class F>
static void dispatch_compute(const Context& context, F f) {
  if (context.compute == Type::float64)
    f(static_cast<double*>(nullptr));
  else if (context.compute == Type::float32)
    f(static_cast<float*>(nullptr));
  else
    throw std::invalid_argument("the CPU kernels compose in float32 or float64");
}

void forward(const Block& block, const Context& context) {
  dispatch_compute(context, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Packed<T> packed = pack<T>(block, false, context.threads);
    const std::int64_t row = block.taps() * block.in_per_group;
    advise_huge_pages(block.kernel, block.out_channels, row);
    parallel_rows(block.out_channels, row, context.threads, [&](std::int64_t begin, std::int64_t end) {
      T* const scratch = thread_buffer<T, scratch_buffer>(scratch_size<T>(block));
      kernels<T>().forward(block, packed, scratch, begin, end);
    });
  });
}

void backward(const Block& block, const Context& context) {
  for (std::int32_t index = 0; index < block.terms; ++index) {
    const ChannelRows rows = channel_rows(block, block.term[index]);
    advise_huge_pages(rows.gradient, block.out_channels, rows.elements);
  }
  const Ranges chunks = chunks_of(block, context.threads);
  std::int64_t max_rows = 0, max_slices = 0;
  for (const auto& [begin, end] : chunks) {
    max_rows = std::max(max_rows, end - begin);
    max_slices = std::max(max_slices, static_cast<std::int64_t>(slices_of(block, begin, end).size()));
  }
  dispatch_compute(context, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Packed<T> packed = pack<T>(block, true, context.threads);
    DepthwiseGradients<T> depthwise(block, max_slices);
    FirstGradients<T> first(block, max_rows);
    const FilterGradients<T> filters(block);
    for (const auto& [begin, end] : chunks) {
      first.chunk.begin = begin;
      first.chunk.end = end;
      const Ranges slices = slices_of(block, begin, end);
      const std::int64_t count = static_cast<std::int64_t>(slices.size());
      const std::int64_t elements = (end - begin) * block.taps() * block.in_per_group;
      depthwise.clear(count);
      parallel(count, elements, context.threads, [&](std::int64_t slice) {
        ChannelSums<T> sums;
        depthwise.point_to(slice, sums);
        filters.point_to(sums);
        T* const scratch = thread_buffer<T, scratch_buffer>(scratch_size<T>(block));
        kernels<T>().backward(block, packed, sums, first.chunk, scratch, slices[slice].first, slices[slice].second);
      });
      depthwise.add(slices);
      first.add_chunk(context.threads);
    }
    first.store(context.threads);
    filters.store();
  });
}

}  // namespace orepa::cpu
