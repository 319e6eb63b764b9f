// Loops over threads. Which thread takes which index must not affect results.
#pragma once

#include <algorithm>
#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace orepa::cpu {

// With fewer elements per thread, waking the threads takes longer than the work.
constexpr std::int64_t min_elements_per_thread = 1 << 14;

// Call f(index) for all indices below `count`, which are work on `elements` together.
template <class F>
static void parallel(std::int64_t count, std::int64_t elements, int threads, F f) {
#ifdef _OPENMP
  const int useful = static_cast<int>(std::min<std::int64_t>({threads, count, elements / min_elements_per_thread}));
  if (useful > 1 && !omp_in_parallel()) {
#pragma omp parallel for num_threads(useful) schedule(static)
    for (std::int64_t index = 0; index < count; ++index) f(index);
    return;
  }
#endif
  for (std::int64_t index = 0; index < count; ++index) f(index);
}

// Call f(first, last) for ranges that cover [0, rows), a few per thread.
template <class F>
static void parallel_rows(std::int64_t rows, std::int64_t row_elements, int threads, F f) {
  if (rows == 0) return;
  const std::int64_t ranges = std::min<std::int64_t>(rows, 4 * std::int64_t{threads});
  const std::int64_t step = (rows + ranges - 1) / ranges;
  parallel((rows + step - 1) / step, rows * row_elements, threads,
           [&](std::int64_t range) { f(range * step, std::min(rows, (range + 1) * step)); });
}

// The same for `per_group` rows of each group: call f(group, first, last), with rows counted within the group.
template <class F>
static void parallel_group_rows(std::int64_t groups, std::int64_t per_group, std::int64_t row_elements, int threads,
                                F f) {
  parallel_rows(groups * per_group, row_elements, threads, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t row = first; row < last;) {
      const std::int64_t group = row / per_group, end = std::min(last, (group + 1) * per_group);
      f(group, row - group * per_group, end - group * per_group);
      row = end;
    }
  });
}

}  // namespace orepa::cpu
