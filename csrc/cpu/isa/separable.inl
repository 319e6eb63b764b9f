// Depthwise separable terms (paper Eq. 4's last branch).
//
// Input channels are processed in tiles of one vector, the last one padded with zeros. A tile's data is contiguous, so
// that it stays in the first-level cache for all output channels:
//   depthwise  [tile][tap][e][lane], one for all output channels of a group
//   pointwise  [tile][e][lane], one per output channel
//   upstream   [tile][tap][lane], one per output channel (backward)

template <class T>
static std::int64_t tiles(std::int64_t columns) {
  return (columns + lanes<T> - 1) / lanes<T>;
}

// Load a row of pointwise weights, [Ig * E], as [tile][e][lane].
template <class T>
static void load_pointwise(const View& view, std::int64_t row, std::int64_t columns, std::int64_t expand, T* to) {
  constexpr std::int64_t n = lanes<T>;
  if (view.type == type_of<T> && view.column == 1 && expand == 8 && columns % n == 0) {
    const T* __restrict from = static_cast<const T*>(view.data) + row * view.row;
    T* __restrict out = to;
    for (std::int64_t tile = 0; tile < columns / n; ++tile, from += 8 * n, out += 8 * n)
      for (std::int64_t lane = 0; lane < n; ++lane)
        for (int e = 0; e < 8; ++e) out[e * n + lane] = from[lane * 8 + e];
    return;
  }
  dispatch_type(view.type, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    const S* from = static_cast<const S*>(view.data) + row * view.row;
    for (std::int64_t tile = 0; tile < tiles<T>(columns); ++tile)
      for (std::int64_t e = 0; e < expand; ++e)
        for (std::int64_t lane = 0; lane < n; ++lane) {
          const std::int64_t i = tile * n + lane;
          to[(tile * expand + e) * n + lane] =
              i < columns ? static_cast<T>(from[(i * expand + e) * view.column]) : T{0};
        }
  });
}

template <class T>
static void store_pointwise(const T* from, std::int64_t columns, std::int64_t expand, const View& view,
                            std::int64_t row) {
  constexpr std::int64_t n = lanes<T>;
  if (view.type == type_of<T> && view.column == 1 && expand == 8 && columns % n == 0) {
    T* __restrict to = static_cast<T*>(view.data) + row * view.row;
    const T* __restrict in = from;
    for (std::int64_t tile = 0; tile < columns / n; ++tile, to += 8 * n, in += 8 * n)
      for (std::int64_t lane = 0; lane < n; ++lane)
        for (int e = 0; e < 8; ++e) to[lane * 8 + e] = in[e * n + lane];
    return;
  }
  dispatch_type(view.type, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    S* to = static_cast<S*>(view.data) + row * view.row;
    for (std::int64_t i = 0; i < columns; ++i)
      for (std::int64_t e = 0; e < expand; ++e)
        to[(i * expand + e) * view.column] = narrow<S>(from[(i / n * expand + e) * n + i % n]);
  });
}

// Pack the depthwise kernels of one group as [tile][tap][e][lane], tiles [begin, end).
template <class T>
static void pack_depthwise(const Block& block, const Term& term, std::int64_t group, T* out, std::int64_t begin,
                           std::int64_t end) {
  const std::int64_t columns = block.in_per_group, expand = term.inner, taps = term.taps();
  const View& a = term.a;
  dispatch_type(a.type, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    const S* from = static_cast<const S*>(a.data) + group * columns * expand * a.row;
    for (std::int64_t i = begin * lanes<T>; i < end * lanes<T>; ++i)
      for (std::int64_t e = 0; e < expand; ++e)
        for (std::int64_t t = 0; t < taps; ++t) {
          const std::int64_t index = ((i / lanes<T> * taps + t) * expand + e) * lanes<T> + i % lanes<T>;
          out[index] = i < columns ? static_cast<T>(from[(i * expand + e) * a.row + t * a.tap]) : T{0};
        }
  });
}

template <class T>
static void unpack_depthwise(const Block& block, const Term& term, std::int64_t group, const T* in) {
  const std::int64_t columns = block.in_per_group, expand = term.inner, taps = term.taps();
  const View& a = term.grad_a;
  dispatch_type(a.type, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    S* to = static_cast<S*>(a.data) + group * columns * expand * a.row;
    for (std::int64_t i = 0; i < columns; ++i)
      for (std::int64_t e = 0; e < expand; ++e)
        for (std::int64_t t = 0; t < taps; ++t) {
          const std::int64_t index = ((i / lanes<T> * taps + t) * expand + e) * lanes<T> + i % lanes<T>;
          to[(i * expand + e) * a.row + t * a.tap] = narrow<S>(in[index]);
        }
  });
}

// Register blocking of the loops below: with AVX-512, two output channels or three taps share each load.
#ifdef __AVX512F__
constexpr int rows_per_step = 2, taps_per_step = 3;
#else
constexpr int rows_per_step = 1, taps_per_step = 1;
#endif

// panel[row][tap][i] += factor[row] * sum_e pointwise[row][e][i] depthwise[tap][e][i], for R output channels, one tile
// and E expansions
template <class T, int E, int R>
static inline void add_separable(const Panel<T>* panels, const Window& window, const T* pointwise, std::int64_t step,
                                 const T* depthwise, std::int64_t expand, const T* factor, std::int64_t begin,
                                 std::int64_t columns) {
  constexpr std::int64_t n = lanes<T>;
  const std::int64_t width = columns - begin < n ? columns - begin : n;
  Vector<T> scaled[R][E];
#pragma GCC unroll 2
  for (int row = 0; row < R; ++row)
#pragma GCC unroll 8
    for (int e = 0; e < E; ++e) scaled[row][e] = load_vector(pointwise + row * step + e * n) * factor[row];
  window.each([&](std::int64_t t, std::int64_t p) {
    const T* const filters = depthwise + t * expand * n;
    Vector<T> sum[R][2] = {};  // two chains of additions hide each other's latency
#pragma GCC unroll 8
    for (int e = 0; e < E; ++e) {
      const Vector<T> d = load_vector(filters + e * n);
#pragma GCC unroll 2
      for (int row = 0; row < R; ++row) sum[row][e % 2] += scaled[row][e] * d;
    }
#pragma GCC unroll 2
    for (int row = 0; row < R; ++row) {
      T* const to = panels[row][p] + begin;
      if (width == n) {
        store_vector(to, load_vector(static_cast<const T*>(to)) + (sum[row][0] + sum[row][1]));
      } else {
        T part[n];
        store_vector(part, sum[row][0] + sum[row][1]);
        for (std::int64_t lane = 0; lane < width; ++lane) to[lane] += part[lane];
      }
    }
  });
}

// grad[row][e][i] = factor[row] * x and dots[row][i] += x * pointwise[row][e][i], with x = sum_t upstream[row][t][i]
// depthwise[t][e][i], for R output channels and E expansions; rows of pointwise and grad are `step` apart.
template <class T, int E, int R>
static inline void pointwise_gradient(const T* upstream, const T* depthwise, std::int64_t expand, std::int64_t taps,
                                      const T* factor, const T* pointwise, T* grad, std::int64_t step, T* dots) {
  constexpr std::int64_t n = lanes<T>;
  Vector<T> sum[R][E] = {};
  for (std::int64_t t = 0; t < taps; ++t) {
    Vector<T> g[R];
#pragma GCC unroll 2
    for (int row = 0; row < R; ++row) g[row] = load_vector(upstream + (row * taps + t) * n);
#pragma GCC unroll 8
    for (int e = 0; e < E; ++e) {
      const Vector<T> d = load_vector(depthwise + (t * expand + e) * n);
#pragma GCC unroll 2
      for (int row = 0; row < R; ++row) sum[row][e] += g[row] * d;
    }
  }
#pragma GCC unroll 2
  for (int row = 0; row < R; ++row) {
    Vector<T> dot = load_vector(static_cast<const T*>(dots + row * n));
#pragma GCC unroll 8
    for (int e = 0; e < E; ++e) {
      dot += sum[row][e] * load_vector(pointwise + row * step + e * n);
      store_vector(grad + row * step + e * n, sum[row][e] * factor[row]);
    }
    store_vector(dots + row * n, dot);
  }
}

// grad[t][e][i] += sum_o factor[o] upstream[o][t][i] pointwise[o][e][i], for N taps and E expansions
template <class T, int E, int N>
static inline void depthwise_gradient(const T* upstream, std::int64_t upstream_step, const T* pointwise,
                                      std::int64_t pointwise_step, const T* factors, std::int64_t rows, T* grad,
                                      std::int64_t expand) {
  constexpr std::int64_t n = lanes<T>;
  Vector<T> sum[N][E];
#pragma GCC unroll 3
  for (int t = 0; t < N; ++t)
#pragma GCC unroll 8
    for (int e = 0; e < E; ++e) sum[t][e] = load_vector(static_cast<const T*>(grad + (t * expand + e) * n));
  for (std::int64_t row = 0; row < rows; ++row) {
    Vector<T> g[N];
#pragma GCC unroll 3
    for (int t = 0; t < N; ++t) g[t] = load_vector(upstream + row * upstream_step + t * n) * factors[row];
#pragma GCC unroll 8
    for (int e = 0; e < E; ++e) {
      const Vector<T> p = load_vector(pointwise + row * pointwise_step + e * n);
#pragma GCC unroll 3
      for (int t = 0; t < N; ++t) sum[t][e] += g[t] * p;
    }
  }
#pragma GCC unroll 3
  for (int t = 0; t < N; ++t)
#pragma GCC unroll 8
    for (int e = 0; e < E; ++e) store_vector(grad + (t * expand + e) * n, sum[t][e]);
}

// Call f(first, number) for all of `count` items, `Step` at a time and the remainder one by one; the number is a
// constant expression.
template <int Step, class F>
static inline void each_step(std::int64_t count, F f) {
  std::int64_t first = 0;
  for (; first + Step <= count; first += Step) f(first, std::integral_constant<int, Step>());
  if constexpr (Step > 1)
    for (; first < count; ++first) f(first, std::integral_constant<int, 1>());
}
