#include "api.h"

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "huge_pages.h"
#include "isa/kernels.h"
#include "sizes.h"

namespace orepa::cpu {

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

template <class T>
constexpr Type type_of = sizeof(T) == sizeof(double) ? Type::float64 : Type::float32;

static bool is_expanded(const Term& term) {
  return term.kind == Kind::separable && term.b.data != nullptr;
}

static std::int64_t rounded_up(std::int64_t size, std::int64_t unit) {
  return (size + unit - 1) / unit * unit;
}

// Input channels as separable terms have them, in whole vectors.
template <class T>
static std::int64_t padded_vectors(const Block& block) {
  return rounded_up(block.in_per_group, kernels<T>().vector_width);
}

// Columns of a product's right matrix.
template <class T>
static std::int64_t padded(std::int64_t width) {
  return rounded_up(width, kernels<T>().tile_width);
}

template <class T>
static std::int64_t depthwise_size(const Block& block, const Term& term) {
  return taps_of(term) * term.inner * padded_vectors<T>(block);
}

// What `rows_at_once` rows need: their panels, products forward or their gradients backward, and copies of factors;
// forward those of all terms together, backward three times one term's.
template <class T>
static std::int64_t scratch_size(const Block& block) {
  const std::int64_t columns = padded_vectors<T>(block), panel = columns * block.taps();
  std::int64_t products = 0, copies = 0, largest = 0, several = 0;
  for (std::int32_t index = 0; index < block.terms; ++index) {
    const Term& term = block.term[index];
    std::int64_t own = term.kind == Kind::pointwise ? columns : panel;
    if (term.kind == Kind::composed) {
      own = taps_of_b(term) * std::max<std::int64_t>(term.inner, width_of(block, term));
      products += taps_of_b(term) * (padded<T>(width_of(block, term)) + padded<T>(term.inner));
      several = std::max(several, own);
    }
    if (is_expanded(term)) several = std::max(several, 2 * term.inner * columns + 16 * taps_of(term));
    copies += own;
    largest = std::max(largest, own);
  }
  return rows_at_once * (panel + products + several) + copies + 3 * largest;
}

// Output channels, [begin, end).
using Ranges = std::vector<std::pair<std::int64_t, std::int64_t>>;

// Sums over output channels are taken in runs of this length, and the runs added up in order: enough runs for 16
// threads, but not so short that adding them up takes as long as what they add.
static std::int64_t run_length(const Block& block) {
  constexpr std::int64_t least = 4 * rows_at_once;
  return std::max<std::int64_t>((block.out_per_group() / 16 + least - 1) / least, 1) * least;
}

// The backward pass works on pieces, of so many elements of dW per thread (256 KB in float32), so that these and as
// much of b are still in the second-level caches when they are multiplied. Results do not depend on what the pieces
// are: they begin where runs begin, and chains of additions.
constexpr std::int64_t piece_elements = 1 << 16;

static Ranges pieces(const Block& block, int threads) {
  const std::int64_t group = block.out_per_group(), run = run_length(block);
  std::int64_t row = block.taps() * block.in_per_group, unit = run;
  for (std::int32_t index = 0; index < block.terms; ++index) {
    const Term& term = block.term[index];
    if (term.kind != Kind::composed) continue;
    row = std::max(row, taps_of_b(term) * std::max<std::int64_t>(term.inner, width_of(block, term)));
    while (unit % rows_per_chain(taps_of_b(term)) != 0) unit += run;
  }
  std::int64_t shared = unit;  // a run for each thread, or as many for each
  while (shared % (threads * run) != 0) shared += unit;
  const std::int64_t rows = std::max(shared, threads * piece_elements / row);
  const std::int64_t whole = rows / group * group;  // channels of as many whole groups as fit
  const std::int64_t step = whole > 0 ? whole : rows / shared * shared;
  const std::int64_t stretch = whole > 0 ? block.out_channels : group;
  Ranges result;
  for (std::int64_t first = 0; first < block.out_channels; first += stretch)
    for (std::int64_t begin = first; begin < first + stretch; begin += step)
      result.emplace_back(begin, std::min(begin + step, first + stretch));
  return result;
}

// Each group of a piece is cut into the same runs, whether it is there whole or in part.
static Ranges runs_of(const Block& block, std::int64_t begin, std::int64_t end) {
  const std::int64_t run = run_length(block), group = block.out_per_group();
  Ranges result;
  for (std::int64_t from = begin; from < end; from = result.back().second)
    result.emplace_back(from, std::min({from + run, (from / group + 1) * group, end}));
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

enum Slot { for_rows, for_depthwise, for_first, for_sums, for_filters, for_pieces, for_totals };

// Calls f(group, begin, end) for all units, so many per group, whose numbers over all groups are in [first, last).
template <class F>
static void each_group(std::int64_t first, std::int64_t last, std::int64_t per_group, F f) {
  for (std::int64_t unit = first; unit < last;) {
    const std::int64_t group = unit / per_group, end = std::min(last, (group + 1) * per_group);
    f(group, unit - group * per_group, end - group * per_group);
    unit = end;
  }
}

template <class T>
static Packed<T> pack(const Block& block, bool for_backward, int threads) {
  std::int64_t depthwise = 0, first = 0;
  const auto depth = [&](const Term& term) { return for_backward ? width_of(block, term) : term.inner; };
  const auto width = [&](const Term& term) { return padded<T>(for_backward ? term.inner : width_of(block, term)); };
  for (std::int32_t index = 0; index < block.terms; ++index) {
    const Term& term = block.term[index];
    if (is_expanded(term)) depthwise += block.groups * depthwise_size<T>(block, term);
    if (term.kind == Kind::composed) first += block.groups * depth(term) * width(term);
  }
  T* depthwise_memory = kept<T, for_depthwise>(depthwise);
  T* first_memory = kept<T, for_first>(first);
  Packed<T> packed;
  for (std::int32_t index = 0; index < block.terms; ++index) {
    const Term& term = block.term[index];
    if (is_expanded(term)) {
      const std::int64_t size = depthwise_size<T>(block, term);
      const std::int64_t tiles = padded_vectors<T>(block) / kernels<T>().vector_width;
      T* const memory = depthwise_memory;
      parallel_rows(0, block.groups * tiles, size / tiles, threads, [&](std::int64_t begin, std::int64_t end) {
        each_group(begin, end, tiles, [&](std::int64_t group, std::int64_t from, std::int64_t to) {
          kernels<T>().pack_depthwise(block, term, group, memory + group * size, from, to);
        });
      });
      packed.depthwise[index] = memory;
      depthwise_memory += block.groups * size;
    } else if (term.kind == Kind::composed) {
      const std::int64_t size = depth(term) * width(term), tiles = width(term) / kernels<T>().tile_width;
      T* const memory = first_memory;
      parallel_rows(0, block.groups * tiles, size / tiles, threads, [&](std::int64_t begin, std::int64_t end) {
        each_group(begin, end, tiles, [&](std::int64_t group, std::int64_t from, std::int64_t to) {
          kernels<T>().pack_first(block, term, group, for_backward, memory + group * size, from, to);
        });
      });
      packed.first[index] = memory;
      first_memory += block.groups * size;
    }
  }
  return packed;
}

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

void forward(const Block& block, const Context& context) {
  with_compute(context, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Packed<T> packed = pack<T>(block, false, context.threads);
    const std::int64_t row = block.taps() * block.in_per_group;
    about_to_fill(block.kernel, block.out_channels, row);
    parallel_rows(0, block.out_channels, row, context.threads, [&](std::int64_t first, std::int64_t last) {
      kernels<T>().forward(block, packed, kept<T, for_rows>(scratch_size<T>(block)), first, last);
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

// Sums over the output channels of one group of the gradients of depthwise kernels: per run, then in the order of runs.
template <class T>
struct DepthwiseSums {
  std::int64_t size[max_terms] = {}, together = 0;
  T *total = nullptr, *runs = nullptr;

  DepthwiseSums(const Block& block, std::int64_t most_runs) {
    for (std::int32_t index = 0; index < block.terms; ++index) {
      const Term& term = block.term[index];
      if (is_expanded(term) && term.grad_a.data != nullptr) size[index] = depthwise_size<T>(block, term);
      together += size[index];
    }
    total = kept<T, for_sums>((1 + most_runs) * together);
    runs = total + together;
  }

  void point_to(std::int64_t run, Sums<T>& sums) const {
    T* next = runs + run * together;
    for (std::int32_t index = 0; index < max_terms; next += size[index++])
      sums.depthwise[index] = size[index] > 0 ? next : nullptr;
  }

  void add(std::int64_t run, bool begins_group) {
    if (begins_group) std::fill(total, total + together, T{0});
    const T* own = runs + run * together;
    for (std::int64_t i = 0; i < together; ++i) total[i] += own[i];
  }

  void hand_over(const Block& block, std::int64_t group) const {
    const T* next = total;
    for (std::int32_t index = 0; index < block.terms; next += size[index++])
      if (size[index] > 0) kernels<T>().unpack_depthwise(block, block.term[index], group, next);
  }
};

// The gradient of a composed term's a: sums over the output channels of each group, of all pieces.
template <class T>
class FirstSums {
 public:
  FirstSums(const Block& block, std::int64_t most_rows) : block_(block) {
    std::int64_t totals = 0, buffers = 0;
    each([&](std::int32_t, const Term& term) {
      totals += total_size(term);
      buffers += most_rows * (flow_row(term) + second_row(term));
    });
    T* total = kept<T, for_totals>(totals);
    T* buffer = kept<T, for_pieces>(buffers);
    each([&](std::int32_t index, const Term& term) {
      totals_[index] = total;
      total += total_size(term);
      piece.flow[index] = buffer;
      buffer += most_rows * flow_row(term);
      if (second_row(term) > 0) piece.second[index] = buffer;
      buffer += most_rows * second_row(term);
    });
  }

  // What the piece contributes.
  void add(int threads) {
    const std::int64_t rows = block_.out_per_group();
    const std::int64_t first = piece.begin / rows, groups = (piece.end - 1) / rows + 1 - first;
    each([&](std::int32_t index, const Term& term) {
      const std::int64_t work = (piece.end - piece.begin) / groups * flow_row(term);
      parallel_rows(0, groups * term.inner, work, threads, [&](std::int64_t begin, std::int64_t end) {
        each_group(begin, end, term.inner, [&](std::int64_t group, std::int64_t from, std::int64_t to) {
          group += first;
          kernels<T>().add_to_first(block_, piece, index, group, total(index, group), group * rows < piece.begin, from,
                                    to);
        });
      });
    });
  }

  void hand_over(int threads) const {
    each([&](std::int32_t index, const Term& term) {
      parallel_rows(0, block_.groups * term.inner, width_of(block_, term), threads,
                    [&](std::int64_t begin, std::int64_t end) {
                      each_group(begin, end, term.inner, [&](std::int64_t group, std::int64_t from, std::int64_t to) {
                        kernels<T>().unpack_first(block_, term, group, total(index, group), from, to);
                      });
                    });
    });
  }

  Piece<T> piece;

 private:
  template <class F>
  void each(F f) const {
    for (std::int32_t index = 0; index < block_.terms; ++index) {
      const Term& term = block_.term[index];
      if (term.kind == Kind::composed && term.grad_a.data != nullptr) f(index, term);
    }
  }

  std::int64_t group_size(const Term& term) const { return term.inner * padded<T>(width_of(block_, term)); }
  std::int64_t total_size(const Term& term) const { return block_.groups * group_size(term); }
  std::int64_t flow_row(const Term& term) const { return taps_of_b(term) * padded<T>(width_of(block_, term)); }
  std::int64_t second_row(const Term& term) const {
    return term.b.type == type_of<T> ? 0 : taps_of_b(term) * term.inner;
  }
  T* total(std::int32_t index, std::int64_t group) const {
    return totals_[index] + group * group_size(block_.term[index]);
  }

  const Block& block_;
  T* totals_[max_terms] = {};
};

void backward(const Block& block, const Context& context) {
  const std::int64_t group_rows = block.out_per_group(), row = block.taps() * block.in_per_group;
  for (std::int32_t index = 0; index < block.terms; ++index) {
    const OutputRows rows = output_rows(block, block.term[index]);
    about_to_fill(rows.gradient, block.out_channels, rows.elements);
  }
  const Ranges all = pieces(block, context.threads);
  std::int64_t most_rows = 0, most_runs = 0;
  for (const auto& [begin, end] : all) {
    most_rows = std::max(most_rows, end - begin);
    most_runs = std::max(most_runs, static_cast<std::int64_t>(runs_of(block, begin, end).size()));
  }
  with_compute(context, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Packed<T> packed = pack<T>(block, true, context.threads);
    DepthwiseSums<T> depthwise(block, most_runs);
    FirstSums<T> first(block, most_rows);
    Sums<T> shared;
    std::int64_t filters = 0;
    const auto wants_filter = [](const Term& term) {
      return term.kind == Kind::pointwise && term.grad_b.data != nullptr;
    };
    for (std::int32_t index = 0; index < block.terms; ++index)
      if (wants_filter(block.term[index])) filters += block.out_channels * taps_of(block.term[index]);
    T* filters_memory = kept<T, for_filters>(filters);
    for (std::int32_t index = 0; index < block.terms; ++index) {
      if (!wants_filter(block.term[index])) continue;
      shared.filters[index] = filters_memory;
      filters_memory += block.out_channels * taps_of(block.term[index]);
    }

    for (const auto& [begin, end] : all) {
      first.piece.begin = begin;
      first.piece.end = end;
      const Ranges runs = runs_of(block, begin, end);
      const std::int64_t count = static_cast<std::int64_t>(runs.size());
      std::fill(depthwise.runs, depthwise.runs + count * depthwise.together, T{0});
      parallel(count, (end - begin) * row, context.threads, [&](std::int64_t part) {
        Sums<T> sums = shared;
        depthwise.point_to(part, sums);
        T* const scratch = kept<T, for_rows>(scratch_size<T>(block));
        kernels<T>().backward(block, packed, sums, first.piece, scratch, runs[part].first, runs[part].second);
      });
      for (std::int64_t part = 0; part < count && depthwise.together > 0; ++part) {
        depthwise.add(part, runs[part].first % group_rows == 0);
        if (runs[part].second % group_rows == 0) depthwise.hand_over(block, runs[part].first / group_rows);
      }
      first.add(context.threads);
    }
    first.hand_over(context.threads);
    for (std::int32_t index = 0; index < block.terms; ++index)
      if (wants_filter(block.term[index])) add_up_filters(block, block.term[index], shared.filters[index]);
  });
}

}  // namespace orepa::cpu
