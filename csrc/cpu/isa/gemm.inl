// Products of a strided left matrix and a packed right one.
//
// BLAS would need transposed copies of the operands, and would pack them once more. Here the left matrix is read in
// place, often from a tensor, and the result is used while it is in the first-level cache.

// The register tile, rows x vectors. AVX-512 has 32 registers, and instructions that multiply by a scalar in memory;
// the others have 16 registers.
#ifdef __AVX512F__
constexpr int tile_rows = 9, tile_vectors = 1;  // a 3x3 kernel has nine taps
#else
constexpr int tile_rows = 6, tile_vectors = 2;
#endif

template <class T>
constexpr std::int64_t tile_width = tile_vectors * lanes<T>;

// Left rows that reuse one tile of the right matrix while it is in the first-level cache.
constexpr int cached_rows = 72;

// A right matrix [depth, width] is packed as [tile][depth][tile_width], the last tile padded with zeros.
template <class T>
static std::int64_t column_tiles(std::int64_t width) {
  return (width + tile_width<T> - 1) / tile_width<T>;
}

template <class T>
static std::int64_t padded(std::int64_t width) {
  return round_up(width, tile_width<T>);
}

// Row `r` of a left matrix begins at data + (r / taps) * major + (r % taps) * minor.
template <class T>
struct LeftRows {
  const T* data;
  std::int64_t taps, major, minor;
};

// The dimension that is summed over, as outer x inner indices: (u, v) is begin + u * outer_step + v * inner_step
// elements from the start of a left row, and row u * inner + v of the right matrix.
//
// Long sums are split into partial sums, because rounding errors grow with the length of a chain of additions. A grid
// is split between indices of `outer`; a line (outer = 1) is split anywhere.
struct Depth {
  std::int64_t outer, outer_step, inner, inner_step;
  bool is_line;
  std::int64_t begin = 0;

  static Depth line(std::int64_t size, std::int64_t step) { return {1, 0, size, step, true}; }
  static Depth grid(std::int64_t outer, std::int64_t outer_step, std::int64_t inner, std::int64_t inner_step) {
    return {outer, outer_step, inner, inner_step, false};
  }

  std::int64_t size() const { return outer * inner; }
};

constexpr std::int64_t line_partial_sum = 512;

// Compute out[r][column] = sum_d left(r, d) right[d][column] for one tile, or add to it; bitwise independent of M.
// Meanwhile, prefetch from the address `prefetch` on.
template <class T, int M>
static void gemm_tile(const T* const* rows, const Depth& depth, const T* __restrict right, T* out, std::int64_t step,
                      bool accumulate, const char* prefetch) {
  constexpr int V = tile_vectors;
  const T* left[M];
  Vector<T> sum[M][V];
#pragma GCC unroll 12
  for (int r = 0; r < M; ++r) {
    left[r] = rows[r];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[r][v] = Vector<T>{};
  }
  for (std::int64_t outer = 0; outer < depth.outer; ++outer) {
    std::int64_t index = depth.begin + outer * depth.outer_step;
    for (std::int64_t inner = 0; inner < depth.inner;) {
      const std::int64_t end = inner + prefetch_interval < depth.inner ? inner + prefetch_interval : depth.inner;
#pragma GCC unroll 8
      for (int line = 0; line < prefetch_lines; ++line, prefetch += cache_line) __builtin_prefetch(prefetch, 0, 2);
      for (; inner < end; ++inner, index += depth.inner_step, right += tile_width<T>) {
        Vector<T> x[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) x[v] = load_vector(right + v * lanes<T>);
#pragma GCC unroll 12
        for (int r = 0; r < M; ++r)
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v) sum[r][v] += x[v] * left[r][index];
      }
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < M; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      T* const to = out + r * step + v * lanes<T>;
      store_vector(to, accumulate ? load_vector(static_cast<const T*>(to)) + sum[r][v] : sum[r][v]);
    }
}

// `gemm_tile` by its number of rows, less one.
template <class T, class Counts>
struct TileKernels;
template <class T, int... M>
struct TileKernels<T, std::integer_sequence<int, M...>> {
  void (*for_rows[sizeof...(M)])(const T* const*, const Depth&, const T*, T*, std::int64_t, bool,
                                 const char*) = {gemm_tile<T, M + 1>...};
};

// Compute out[r][column] = sum_d left(r, d) right(d, column), or add to it, for `count` rows and whole tiles of
// columns; rows of out are `step` elements apart. Meanwhile, run `prefetcher`.
template <class T>
static void gemm(const LeftRows<T>& left, std::int64_t count, const Depth& depth, const T* right,
                 std::int64_t column_tiles, T* out, std::int64_t step, bool accumulate, Prefetcher& prefetcher) {
  static constexpr TileKernels<T, std::make_integer_sequence<int, tile_rows>> tile_kernels;
  const T* rows[cached_rows];
  for (std::int64_t begin = 0; begin < count; begin += cached_rows) {
    const int block_rows = static_cast<int>(count - begin < cached_rows ? count - begin : cached_rows);
    std::int64_t major = begin / left.taps, minor = begin % left.taps;
    for (int r = 0; r < block_rows; ++r) {
      rows[r] = left.data + major * left.major + minor * left.minor;
      if (++minor == left.taps) ++major, minor = 0;
    }
    const int parts = (block_rows + tile_rows - 1) / tile_rows;
    const std::int64_t total = depth.is_line ? depth.inner : depth.outer;
    const std::int64_t partial_sum = depth.is_line ? line_partial_sum : channels_per_partial_sum(depth.inner);
    Depth range = depth;
    for (std::int64_t done = 0; done < total; done += partial_sum) {
      (depth.is_line ? range.inner : range.outer) = total - done < partial_sum ? total - done : partial_sum;
      range.begin = done * (depth.is_line ? depth.inner_step : depth.outer_step);
      const T* const first_tile = right + done * (depth.is_line ? 1 : depth.inner) * tile_width<T>;
      for (std::int64_t tile = 0; tile < column_tiles; ++tile)
        for (int part = 0; part < parts; ++part) {  // of nearly equal size
          const int first = block_rows * part / parts, last = block_rows * (part + 1) / parts;
          const T* const right_tile = first_tile + tile * depth.size() * tile_width<T>;
          tile_kernels.for_rows[last - first - 1](rows + first, range, right_tile,
                                                  out + (begin + first) * step + tile * tile_width<T>, step,
                                                  accumulate || done > 0, prefetcher.next(range.size(), right_tile));
        }
    }
  }
}
