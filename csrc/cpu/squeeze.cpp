#include "squeeze.h"

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "kernels.h"

namespace orepa::cpu {

// --- instruction sets -----------------------------------------------------------------------------------------------

#define OREPA_DECLARE(isa)                     \
  namespace isa {                              \
  extern const Kernels<float> float_kernels;   \
  extern const Kernels<double> double_kernels; \
  }
OREPA_DECLARE(baseline)
#ifdef OREPA_X86_KERNELS
OREPA_DECLARE(avx2)
OREPA_DECLARE(avx512)
#endif
#undef OREPA_DECLARE

enum class Isa { baseline, avx2, avx512 };

static Isa detected() {
#ifdef OREPA_X86_KERNELS
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::baseline;
}

static const Isa isa = detected();

const char* instruction_set() {
  return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "baseline";
}

template <>
const Kernels<float>& kernels<float>() {
#ifdef OREPA_X86_KERNELS
  if (isa == Isa::avx512) return avx512::float_kernels;
  if (isa == Isa::avx2) return avx2::float_kernels;
#endif
  return baseline::float_kernels;
}

template <>
const Kernels<double>& kernels<double>() {
#ifdef OREPA_X86_KERNELS
  if (isa == Isa::avx512) return avx512::double_kernels;
  if (isa == Isa::avx2) return avx2::double_kernels;
#endif
  return baseline::double_kernels;
}

bool knows([[maybe_unused]] Type type) {
#ifdef __FLT16_MANT_DIG__
  return true;
#else
  return type != Type::float16;
#endif
}

// --- threads --------------------------------------------------------------------------------------------------------

// Below so many elements, waking threads takes longer than the work.
constexpr std::int64_t worth_a_thread = 1 << 14;

// Calls f(index) for all indices below `count`. Which thread takes which must not matter to the result.
template <class F>
static void parallel(std::int64_t count, std::int64_t elements, int threads, F f) {
#ifdef _OPENMP
  const int useful = static_cast<int>(std::min<std::int64_t>({threads, count, elements / worth_a_thread}));
  if (useful > 1 && !omp_in_parallel()) {
#pragma omp parallel for num_threads(useful) schedule(static)
    for (std::int64_t index = 0; index < count; ++index) f(index);
    return;
  }
#endif
  for (std::int64_t index = 0; index < count; ++index) f(index);
}

// The same for rows [begin, end) of so many elements each, in a few runs per thread.
template <class F>
static void parallel_rows(std::int64_t begin, std::int64_t end, std::int64_t row, int threads, F f) {
  const std::int64_t rows = end - begin, runs = std::min<std::int64_t>(rows, 4 * std::int64_t{threads});
  const std::int64_t step = (rows + runs - 1) / std::max<std::int64_t>(runs, 1);
  parallel(runs == 0 ? 0 : (rows + step - 1) / step, rows * row, threads,
           [&](std::int64_t run) { f(begin + run * step, std::min(end, begin + (run + 1) * step)); });
}

// --- sizes ----------------------------------------------------------------------------------------------------------

static std::int64_t taps_of_a(const Term& term) {
  return std::int64_t{term.first_height} * term.first_width;
}

static std::int64_t taps_of_b(const Term& term) {
  return std::int64_t{term.height - term.first_height + 1} * (term.width - term.first_width + 1);
}

static std::int64_t taps_of(const Term& term) {
  return std::int64_t{term.height} * term.width;
}

static bool is_expanded(const Term& term) {
  return term.kind == Kind::separable && term.b.data != nullptr;
}

// Input channels rounded up to whole vectors, of which the largest have 64 bytes.
template <class T>
static std::int64_t padded(const Block& block) {
  constexpr std::int64_t lanes = 64 / sizeof(T);
  return (block.in_per_group + lanes - 1) / lanes * lanes;
}

template <class T>
static std::int64_t depthwise_size(const Block& block, const Term& term) {
  return taps_of(term) * term.inner * padded<T>(block);
}

// What one row needs beside itself: forward copies of all factors, backward up to three of one term's.
template <class T>
static std::int64_t scratch_size(const Block& block) {
  const std::int64_t columns = padded<T>(block), panel = columns * block.taps();
  std::int64_t copies = 0, largest = 0, expanded = 0;
  for (std::int32_t index = 0; index < block.terms; ++index) {
    const Term& term = block.term[index];
    if (is_expanded(term)) expanded += separable_rows * (2 * term.inner * columns + 16 * taps_of(term));
    const std::int64_t own = term.kind == Kind::composed    ? std::int64_t{term.inner} * taps_of_b(term)
                             : term.kind == Kind::pointwise ? columns
                                                            : panel;
    copies += own;
    largest = std::max(largest, own);
  }
  return separable_rows * panel + std::max({copies, 3 * largest, expanded});
}

// Sums over output channels are taken in runs of this length, and the runs added up in order: enough runs for 16
// threads, but not so short that adding them up takes as long as what they add.
static std::int64_t run_length(const Block& block) {
  return std::max<std::int64_t>(4 * separable_rows, (block.out_per_group() + 15) / 16);
}

// A piece's matrix has about so many elements: 1 MB in float32.
constexpr std::int64_t piece_elements = 1 << 18;

std::vector<std::pair<std::int64_t, std::int64_t>> pieces(const Block& block) {
  std::int64_t row = block.taps() * block.in_per_group;
  for (std::int32_t index = 0; index < block.terms; ++index) {
    const Term& term = block.term[index];
    if (term.kind == Kind::composed)
      row = std::max(row, taps_of_b(term) * std::max<std::int64_t>(term.inner, taps_of_a(term) * block.in_per_group));
  }
  const std::int64_t group = block.out_per_group(), run = run_length(block), rows = std::max(run, piece_elements / row);
  const std::int64_t whole = rows / group * group;  // channels of as many whole groups as fit
  const std::int64_t step = whole > 0 ? whole : rows / run * run;
  const std::int64_t stretch = whole > 0 ? block.out_channels : group;
  std::vector<std::pair<std::int64_t, std::int64_t>> result;
  for (std::int64_t first = 0; first < block.out_channels; first += stretch)
    for (std::int64_t begin = first; begin < first + stretch; begin += step)
      result.emplace_back(begin, std::min(begin + step, first + stretch));
  return result;
}

// --- memory ---------------------------------------------------------------------------------------------------------

// Memory that a thread keeps for its next call: fresh pages cost more than what is computed in them. Contents are left
// over. It begins with a cache line: a vector that lies across two of them takes twice as long to load.
template <class T, int slot>
static T* kept(std::int64_t size) {
  constexpr std::size_t line = 64;
  static thread_local std::vector<T> memory;
  const std::size_t wanted = static_cast<std::size_t>(size) + line / sizeof(T);
  if (memory.size() < wanted) memory.resize(wanted);
  void* begin = memory.data();
  std::size_t space = memory.size() * sizeof(T);
  return static_cast<T*>(std::align(line, space - line, begin, space));
}

enum Slot { for_rows, for_depthwise, for_sums, for_filters };

// A buffer that begins with output channel `begin`, addressed as if it began with channel 0.
template <class T>
static T* from_zero(T* buffer, std::int64_t begin, std::int64_t row) {
  return buffer == nullptr ? nullptr : buffer - begin * row;
}

// The separable terms' depthwise kernels, packed.
template <class T>
struct Depthwise {
  const T* of[max_terms] = {};

  explicit Depthwise(const Block& block) {
    std::int64_t total = 0;
    for (std::int32_t index = 0; index < block.terms; ++index)
      if (is_expanded(block.term[index])) total += block.groups * depthwise_size<T>(block, block.term[index]);
    T* memory = kept<T, for_depthwise>(total);
    for (std::int32_t index = 0; index < block.terms; ++index) {
      const Term& term = block.term[index];
      if (!is_expanded(term)) continue;
      of[index] = memory;
      for (std::int64_t group = 0; group < block.groups; ++group, memory += depthwise_size<T>(block, term))
        kernels<T>().pack_depthwise(block, term, group, memory);
    }
  }
};

// --- the calls ------------------------------------------------------------------------------------------------------

// Calls f with a pointer to the type to compute in.
template <class F>
static void with_compute(const Context& context, F f) {
  if (context.compute == Type::float64)
    f(static_cast<double*>(nullptr));
  else if (context.compute == Type::float32)
    f(static_cast<float*>(nullptr));
  else
    throw std::invalid_argument("the CPU kernels compose in float32 or float64");
}

void pack(const View& view, const View& factor, std::int64_t begin, std::int64_t end, std::int64_t columns,
          std::int64_t taps, void* out, const Context& context) {
  with_compute(context, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T* const to = from_zero(static_cast<T*>(out), begin, taps * columns);
    parallel_rows(begin, end, taps * columns, context.threads, [&](std::int64_t first, std::int64_t last) {
      kernels<T>().pack(view, factor, columns, taps, to, first, last);
    });
  });
}

void unpack(const void* panels, std::int64_t rows, std::int64_t columns, std::int64_t taps, const View& view,
            const Context& context) {
  with_compute(context, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    parallel_rows(0, rows, taps * columns, context.threads, [&](std::int64_t first, std::int64_t last) {
      kernels<T>().unpack(static_cast<const T*>(panels), columns, taps, view, first, last);
    });
  });
}

void forward(const Block& block, const void* const* products, std::int64_t begin, std::int64_t end,
             const Context& context) {
  with_compute(context, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Depthwise<T> depthwise(block);
    const T* own_products[max_terms];
    for (std::int32_t index = 0; index < block.terms; ++index) {
      const Term& term = block.term[index];
      own_products[index] = from_zero(static_cast<const T*>(products[index]), begin,
                                      taps_of_a(term) * taps_of_b(term) * block.in_per_group);
    }
    const std::int64_t row = block.taps() * block.in_per_group;
    parallel_rows(begin, end, row, context.threads, [&](std::int64_t first, std::int64_t last) {
      T* const scratch = kept<T, for_rows>(scratch_size<T>(block));
      kernels<T>().forward(block, own_products, depthwise.of, scratch, first, last);
    });
  });
}

template <class T>
static void add_up_filters(const Block& block, const Term& term, T* rows) {
  const std::int64_t filters = term.grad_b.row == 0 ? 1 : block.out_channels, taps = taps_of(term);
  if (filters == 1)
    for (std::int64_t o = 1; o < block.out_channels; ++o)
      for (std::int64_t t = 0; t < taps; ++t) rows[t] += rows[o * taps + t];
  const View taps_as_columns = {term.grad_b.data, term.grad_b.row, term.grad_b.tap, 0, term.grad_b.type};
  kernels<T>().unpack(rows, taps, 1, taps_as_columns, 0, filters);
}

void backward(const Block& block, void* panels, std::int64_t begin, std::int64_t end, const Context& context) {
  const std::int64_t run = run_length(block), group_rows = block.out_per_group();
  // Runs of the piece: each group of it is cut into the same ones, whether it is there whole or in part.
  std::vector<std::pair<std::int64_t, std::int64_t>> runs;
  for (std::int64_t first = begin; first < end;) {
    const std::int64_t group_end = (first / group_rows + 1) * group_rows;
    runs.emplace_back(first, std::min({first + run, group_end, end}));
    first = runs.back().second;
  }
  with_compute(context, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Depthwise<T> depthwise(block);
    // Per separable term the total of the group under way, then the sums of each run.
    std::int64_t size[max_terms] = {}, sums_size = 0, filters_size = 0;
    bool wants_filter[max_terms] = {};
    for (std::int32_t index = 0; index < block.terms; ++index) {
      const Term& term = block.term[index];
      if (is_expanded(term) && term.grad_a.data != nullptr) size[index] = depthwise_size<T>(block, term);
      wants_filter[index] = term.kind == Kind::pointwise && term.grad_b.data != nullptr;
      sums_size += size[index];
      filters_size += wants_filter[index] ? block.out_channels * taps_of(term) : 0;
    }
    const std::int64_t count = static_cast<std::int64_t>(runs.size());
    T* const totals = kept<T, for_sums>((1 + count) * sums_size);
    T* const sums = totals + sums_size;
    T* filters[max_terms] = {};
    T* filters_memory = kept<T, for_filters>(filters_size);
    for (std::int32_t index = 0; index < block.terms; ++index) {
      if (!wants_filter[index]) continue;
      filters[index] = filters_memory;
      filters_memory += block.out_channels * taps_of(block.term[index]);
    }
    std::fill(sums, sums + count * sums_size, T{0});
    const std::int64_t row = block.taps() * block.in_per_group;
    T* const own_panels = from_zero(static_cast<T*>(panels), begin, row);
    parallel(count, (end - begin) * row, context.threads, [&](std::int64_t part) {
      T *own_sums[max_terms], *next = sums + part * sums_size;
      for (std::int32_t index = 0; index < block.terms; next += size[index++])
        own_sums[index] = size[index] > 0 ? next : nullptr;
      T* const scratch = kept<T, for_rows>(scratch_size<T>(block));
      kernels<T>().backward(block, own_panels, depthwise.of, own_sums, filters, scratch, runs[part].first,
                            runs[part].second);
    });
    for (std::int64_t part = 0; part < count && sums_size > 0; ++part) {
      const T* own = sums + part * sums_size;
      if (runs[part].first % group_rows == 0) std::fill(totals, totals + sums_size, T{0});
      for (std::int64_t i = 0; i < sums_size; ++i) totals[i] += own[i];
      if (runs[part].second % group_rows != 0) continue;
      const T* total = totals;
      for (std::int32_t index = 0; index < block.terms; total += size[index++])
        if (size[index] > 0)
          kernels<T>().unpack_depthwise(block, block.term[index], runs[part].first / group_rows, total);
    }
    for (std::int32_t index = 0; index < block.terms; ++index)
      if (wants_filter[index] && end == block.out_channels) add_up_filters(block, block.term[index], filters[index]);
  });
}

void composed_backward(const Block& block, int index, const void* panels, const void* product, std::int64_t begin,
                       std::int64_t end, const Context& context) {
  with_compute(context, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Term& term = block.term[index];
    const std::int64_t row = block.taps() * block.in_per_group, product_row = taps_of_b(term) * term.inner;
    const T* const own_panels = from_zero(static_cast<const T*>(panels), begin, row);
    const T* const own_product = from_zero(static_cast<const T*>(product), begin, product_row);
    parallel_rows(begin, end, product_row, context.threads, [&](std::int64_t first, std::int64_t last) {
      T* const scratch = kept<T, for_rows>(scratch_size<T>(block));
      kernels<T>().composed_backward(block, term, own_panels, own_product, scratch, first, last);
    });
  });
}

bool needs_gather(const Block& block, int index) {
  const Term& term = block.term[index];
  const bool full_size = term.height == block.height && term.width == block.width;
  return !(full_size && (taps_of_a(term) == 1 || taps_of_b(term) == 1));
}

void gather(const Block& block, int index, const void* panels, void* out, std::int64_t begin, std::int64_t end,
            const Context& context) {
  with_compute(context, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Term& term = block.term[index];
    const std::int64_t row = block.taps() * block.in_per_group;
    const std::int64_t out_row = taps_of_a(term) * taps_of_b(term) * block.in_per_group;
    const T* const own_panels = from_zero(static_cast<const T*>(panels), begin, row);
    T* const own_out = from_zero(static_cast<T*>(out), begin, out_row);
    parallel_rows(begin, end, out_row, context.threads, [&](std::int64_t first, std::int64_t last) {
      kernels<T>().gather(block, term, own_panels, own_out, first, last);
    });
  });
}

}  // namespace orepa::cpu
