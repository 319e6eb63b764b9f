// Matrix products of any left matrix with a packed right one. Included by rows.cpp only, inside its namespace.
//
// BLAS would have to be fed: with matrices transposed for it, through memory, where it packs them once more. Here the
// left matrix is read as it lies, be it a tensor's own memory, and what comes out is used while it is in the nearest
// cache.

// What is computed at a time: so many rows by so many vectors, all in registers. With AVX-512 there are 32 of those,
// and an instruction that multiplies by a number in memory; else 16.
#ifdef __AVX512F__
constexpr int tile_rows = 9, tile_vectors = 1;  // a 3x3 kernel has nine taps
#else
constexpr int tile_rows = 6, tile_vectors = 2;
#endif

template <class T>
constexpr std::int64_t tile_width = tile_vectors * lanes<T>;

// So many rows pass by one tile of the right matrix while that is in the nearest cache.
constexpr int block_rows = 72;

// A right matrix [depth, width] is packed as [tile][depth][tile_width], the last tile padded with zeros.
template <class T>
static std::int64_t right_tiles(std::int64_t width) {
  return (width + tile_width<T> - 1) / tile_width<T>;
}

// Row `r` of a left matrix begins at data + (r / taps) * major + (r % taps) * minor.
template <class T>
struct Rows {
  const T* data;
  std::int64_t taps, major, minor;
};

// The dimension that is summed over: index (u, v) of outer x inner is begin + u * outer_step + v * inner_step elements
// from the beginning of a left row, and the (u * inner + v)-th of the right matrix.
//
// Long sums are taken in parts, of `chain` indices, and the parts added up: rounding errors of one chain of additions
// grow with its length. A grid is cut between indices of `outer`, wherever it begins; a line, of which there is one row
// (outer = 1), is cut anywhere.
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

constexpr std::int64_t line_chain = 512;

// out[r][column] = sum_d left(r, d) right[d][column] for one tile, or added to it; the same bits whatever M is. What
// lies at `ahead` is asked for meanwhile: see Ahead.
template <class T, int M>
static void multiply_tile(const T* const* rows, const Depth& depth, const T* __restrict right, T* out,
                          std::int64_t step, bool add, const char* ahead) {
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
    std::int64_t at = depth.begin + outer * depth.outer_step;
    for (std::int64_t inner = 0; inner < depth.inner;) {
      const std::int64_t end = inner + steps_between < depth.inner ? inner + steps_between : depth.inner;
#pragma GCC unroll 8
      for (int line = 0; line < lines_ahead; ++line, ahead += cache_line) __builtin_prefetch(ahead, 0, 2);
      for (; inner < end; ++inner, at += depth.inner_step, right += tile_width<T>) {
        Vector<T> x[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) x[v] = load_vector(right + v * lanes<T>);
#pragma GCC unroll 12
        for (int r = 0; r < M; ++r)
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v) sum[r][v] += x[v] * left[r][at];
      }
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < M; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      T* const to = out + r * step + v * lanes<T>;
      store_vector(to, add ? load_vector(static_cast<const T*>(to)) + sum[r][v] : sum[r][v]);
    }
}

template <class T, class Counts>
struct Tiles;
template <class T, int... M>
struct Tiles<T, std::integer_sequence<int, M...>> {
  void (*of[sizeof...(M)])(const T* const*, const Depth&, const T*, T*, std::int64_t, bool,
                           const char*) = {multiply_tile<T, M + 1>...};
};

// out[r][column] = sum_d left(r, d) right(d, column), or added to it, for `count` rows and whole tiles of columns;
// `step` elements from row to row of out. Meanwhile, `ahead` is asked for.
template <class T>
static void multiply(const Rows<T>& left, std::int64_t count, const Depth& depth, const T* right,
                     std::int64_t right_tiles, T* out, std::int64_t step, bool add, Ahead& ahead) {
  static constexpr Tiles<T, std::make_integer_sequence<int, tile_rows>> of_rows;
  const T* rows[block_rows];
  for (std::int64_t begin = 0; begin < count; begin += block_rows) {
    const int some = static_cast<int>(count - begin < block_rows ? count - begin : block_rows);
    std::int64_t major = begin / left.taps, minor = begin % left.taps;
    for (int r = 0; r < some; ++r) {
      rows[r] = left.data + major * left.major + minor * left.minor;
      if (++minor == left.taps) ++major, minor = 0;
    }
    const int parts = (some + tile_rows - 1) / tile_rows;
    const std::int64_t whole = depth.is_line ? depth.inner : depth.outer;
    const std::int64_t chain = depth.is_line ? line_chain : rows_per_chain(depth.inner);
    Depth piece = depth;
    for (std::int64_t done = 0; done < whole; done += chain) {
      (depth.is_line ? piece.inner : piece.outer) = whole - done < chain ? whole - done : chain;
      piece.begin = done * (depth.is_line ? depth.inner_step : depth.outer_step);
      const T* const own = right + done * (depth.is_line ? 1 : depth.inner) * tile_width<T>;
      for (std::int64_t tile = 0; tile < right_tiles; ++tile)
        for (int part = 0; part < parts; ++part) {  // of equal size, or nearly so
          const int first = some * part / parts, last = some * (part + 1) / parts;
          const T* const own_tile = own + tile * depth.size() * tile_width<T>;
          of_rows.of[last - first - 1](rows + first, piece, own_tile,
                                       out + (begin + first) * step + tile * tile_width<T>, step, add || done > 0,
                                       ahead.next(piece.size(), own_tile));
        }
    }
  }
}
