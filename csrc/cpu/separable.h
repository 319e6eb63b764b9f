// Depthwise separable terms (paper Eq. 4's last branch). Included by rows.cpp only, inside its namespace.

// Input channels are taken in tiles of one vector, the last one padded with zeros; all that belongs to a tile lies
// together, so that it stays in the nearest cache while output channels pass by:
//   depthwise  [tile][tap][e][lane], one for all output channels of a group
//   pointwise  [tile][e][lane], one per output channel
//   upstream   [tile][tap][lane], likewise (backward)
template <class T>
static std::int64_t tiles(std::int64_t columns) {
  return (columns + lanes<T> - 1) / lanes<T>;
}

// A row of pointwise weights, [Ig * E], as [tile][e][lane].
template <class T>
static void load_expanded(const View& view, std::int64_t row, std::int64_t columns, std::int64_t expand, T* to) {
  constexpr std::int64_t n = lanes<T>;
  if (view.type == type_of<T> && view.column == 1 && expand == 8 && columns % n == 0) {
    const T* __restrict from = static_cast<const T*>(view.data) + row * view.row;
    T* __restrict out = to;
    for (std::int64_t tile = 0; tile < columns / n; ++tile, from += 8 * n, out += 8 * n)
      for (std::int64_t lane = 0; lane < n; ++lane)
        for (int e = 0; e < 8; ++e) out[e * n + lane] = from[lane * 8 + e];
    return;
  }
  with_type(view.type, [&](auto* type) {
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
static void store_expanded(const T* from, std::int64_t columns, std::int64_t expand, const View& view,
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
  with_type(view.type, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    S* to = static_cast<S*>(view.data) + row * view.row;
    for (std::int64_t i = 0; i < columns; ++i)
      for (std::int64_t e = 0; e < expand; ++e)
        to[(i * expand + e) * view.column] = narrow<S>(from[(i / n * expand + e) * n + i % n]);
  });
}

// The depthwise kernels of one group as [tile][tap][e][lane].
template <class T>
static void pack_depthwise(const Block& block, const Term& term, std::int64_t group, T* out) {
  const std::int64_t columns = block.in_per_group, expand = term.inner, taps = term.height * term.width;
  const View& a = term.a;
  with_type(a.type, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    const S* from = static_cast<const S*>(a.data) + group * columns * expand * a.row;
    for (std::int64_t i = 0; i < tiles<T>(columns) * lanes<T>; ++i)
      for (std::int64_t e = 0; e < expand; ++e)
        for (std::int64_t t = 0; t < taps; ++t) {
          const std::int64_t place = ((i / lanes<T> * taps + t) * expand + e) * lanes<T> + i % lanes<T>;
          out[place] = i < columns ? static_cast<T>(from[(i * expand + e) * a.row + t * a.tap]) : T{0};
        }
  });
}

template <class T>
static void unpack_depthwise(const Block& block, const Term& term, std::int64_t group, const T* in) {
  const std::int64_t columns = block.in_per_group, expand = term.inner, taps = term.height * term.width;
  const View& a = term.grad_a;
  with_type(a.type, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    S* to = static_cast<S*>(a.data) + group * columns * expand * a.row;
    for (std::int64_t i = 0; i < columns; ++i)
      for (std::int64_t e = 0; e < expand; ++e)
        for (std::int64_t t = 0; t < taps; ++t) {
          const std::int64_t place = ((i / lanes<T> * taps + t) * expand + e) * lanes<T> + i % lanes<T>;
          to[(i * expand + e) * a.row + t * a.tap] = narrow<S>(in[place]);
        }
  });
}

// panel[tap][i] += factor * sum_e pointwise[e][i] depthwise[tap][e][i], for one tile and E expansions in registers
template <class T, int E>
static inline void add_separable(Panel<T> panel, const Centred& at, const T* pointwise, const T* depthwise,
                                 std::int64_t expand, T factor, std::int64_t begin, std::int64_t columns) {
  constexpr std::int64_t n = lanes<T>;
  const std::int64_t width = columns - begin < n ? columns - begin : n;
  Vector<T> p[E];
#pragma GCC unroll 8
  for (int e = 0; e < E; ++e) p[e] = load_vector(pointwise + e * n) * factor;
  at.each([&](std::int64_t t, std::int64_t place) {
    const T* const own = depthwise + t * expand * n;
    Vector<T> sum[2] = {};  // two chains of additions hide each other's latency
#pragma GCC unroll 8
    for (int e = 0; e < E; ++e) sum[e % 2] += p[e] * load_vector(own + e * n);
    T* const to = panel[place] + begin;
    if (width == n) {
      store_vector(to, load_vector(static_cast<const T*>(to)) + (sum[0] + sum[1]));
    } else {
      T part[n];
      store_vector(part, sum[0] + sum[1]);
      for (std::int64_t lane = 0; lane < width; ++lane) to[lane] += part[lane];
    }
  });
}

// grad[e][i] = sum_t upstream[t][i] depthwise[t][e][i], for one output channel and E expansions in registers
template <class T, int E>
static inline void pointwise_gradient(const T* upstream, const T* depthwise, std::int64_t expand, std::int64_t taps,
                                      T* grad) {
  constexpr std::int64_t n = lanes<T>;
  Vector<T> sum[E] = {};
  for (std::int64_t t = 0; t < taps; ++t) {
    const Vector<T> g = load_vector(upstream + t * n);
#pragma GCC unroll 8
    for (int e = 0; e < E; ++e) sum[e] += g * load_vector(depthwise + (t * expand + e) * n);
  }
#pragma GCC unroll 8
  for (int e = 0; e < E; ++e) store_vector(grad + e * n, sum[e]);
}

// grad[t][e][i] += sum_o factor[o] upstream[o][t][i] pointwise[o][e][i], for one tap and E expansions in registers
template <class T, int E>
static inline void depthwise_gradient(const T* upstream, std::int64_t upstream_step, const T* pointwise,
                                      std::int64_t pointwise_step, const T* factors, std::int64_t rows, T* grad) {
  constexpr std::int64_t n = lanes<T>;
  Vector<T> sum[E];
#pragma GCC unroll 8
  for (int e = 0; e < E; ++e) sum[e] = load_vector(static_cast<const T*>(grad + e * n));
  for (std::int64_t row = 0; row < rows; ++row) {
    const Vector<T> g = load_vector(upstream + row * upstream_step) * factors[row];
#pragma GCC unroll 8
    for (int e = 0; e < E; ++e) sum[e] += g * load_vector(pointwise + row * pointwise_step + e * n);
  }
#pragma GCC unroll 8
  for (int e = 0; e < E; ++e) store_vector(grad + e * n, sum[e]);
}
