// From the gradient of a kernel to those of its terms. Included by rows.cpp only, inside its namespace.

template <class T>
static T dense_backward(const Block& block, const Term& term, Panel<const T> g, std::int64_t o, T scale, T* spare) {
  const std::int64_t columns = block.in_per_group, taps = block.taps();
  const Centred at(block, term);
  const bool wanted = term.grad_a.data != nullptr;
  if (at.taps() == taps && same_runs<T>(block.kernel, term.a, columns, taps) &&
      (!wanted || same_runs<T>(block.kernel, term.grad_a, columns, taps))) {  // all as they lie
    const T *const from = in_place<T>(block.kernel, o).data, *const a = in_place<T>(term.a, o).data;
    if (!wanted) return dot(from, a, taps * columns);
    return set_and_dot(in_place<T>(term.grad_a, o).data, from, a, scale, taps * columns);
  }
  const Panel<const T> a = panel<T>(term.a, o, columns, at.taps(), spare);
  const bool direct = wanted && is_panel<T>(term.grad_a, columns);
  const Panel<T> out = direct ? in_place<T>(term.grad_a, o) : Panel<T>{spare + at.taps() * columns, columns};
  T sum = 0;
  at.each([&](std::int64_t t, std::int64_t p) { sum += set_and_dot(out[t], g[p], a[t], scale, columns); });
  if (wanted && !direct) store(static_cast<const T*>(out.data), columns, columns, at.taps(), term.grad_a, o);
  return sum;
}

template <class T>
static T pointwise_backward(const Block& block, const Term& term, Panel<const T> g, std::int64_t o, T scale, T* filters,
                            T* spare) {
  const std::int64_t columns = block.in_per_group;
  const Centred at(block, term);
  const Filter<T> filter(term, o);
  if (term.a.data == nullptr) {
    T sum = 0;
    at.each([&](std::int64_t t, std::int64_t p) {
      const T value = g[p][o % columns];
      if (filters != nullptr) filters[o * at.taps() + t] = scale * value;
      sum += filter[t] * value;
    });
    return sum;
  }
  T *const filtered = spare, *const copy = spare + columns, *const gradient = spare + 2 * columns;
  const Panel<const T> a = panel<T>(term.a, o, columns, 1, copy);
  Combination<T> sum;
  sum.begin(filtered, columns);
  at.each([&](std::int64_t t, std::int64_t p) {
    sum.add(g[p], filter[t]);
    if (filters != nullptr) filters[o * at.taps() + t] = scale * dot(g[p], a[0], columns);
  });
  sum.end();
  if (term.grad_a.data == nullptr) return dot(static_cast<const T*>(filtered), a[0], columns);
  const bool direct = is_panel<T>(term.grad_a, columns);
  T* const out = direct ? in_place<T>(term.grad_a, o).data : gradient;
  const T result = set_and_dot(out, static_cast<const T*>(filtered), a[0], scale, columns);
  if (!direct) store(static_cast<const T*>(out), columns, columns, 1, term.grad_a, o);
  return result;
}

// A depthwise convolution alone: one input channel per output channel.
template <class T>
static T depthwise_backward(const Block& block, const Term& term, Panel<const T> g, std::int64_t o, T scale) {
  const Centred at(block, term);
  const View values = {term.a.data, term.a.row, term.a.tap, 0, term.a.type};  // taps as columns
  const View gradient = {term.grad_a.data, term.grad_a.row, term.grad_a.tap, 0, term.grad_a.type};
  T sum = 0;
  at.each([&](std::int64_t t, std::int64_t p) {
    const T value = g[p][o / term.inner % block.in_per_group];
    sum += value * scalar<T>(values, o, t, 0);
    if (gradient.data != nullptr) set_scalar(gradient, o, t, scale * value);
  });
  return sum;
}

// Output channels [begin, end), `rows_at_once` of them at most: one input tile is worked on for all of them.
template <class T>
static void separable_backward(const Block& block, const Term& term, const Panel<const T>* g, const T* depthwise,
                               T* grad_depthwise, T* scratch, std::int64_t begin, std::int64_t end) {
  constexpr std::int64_t n = lanes<T>;
  const std::int64_t columns = block.in_per_group, expand = term.inner, count = tiles<T>(columns), rows = end - begin;
  const Centred at(block, term);
  const std::int64_t taps = at.taps(), group = begin / block.out_per_group();
  T *const pointwise = scratch, *const gradient = pointwise + rows * expand * count * n;  // [row][tile][e][lane]
  T* const upstream = gradient + rows * expand * count * n;                               // [row][tap][lane]
  T factors[rows_at_once], dots[rows_at_once * n] = {};
  for (std::int64_t row = 0; row < rows; ++row) {
    load_expanded(term.b, begin + row, columns, expand, pointwise + row * expand * count * n);
    factors[row] = scale_of<T>(block, term, begin + row);
  }
  const T* const own_depthwise = depthwise + group * count * n * taps * expand;
  for (std::int64_t tile = 0; tile < count; ++tile) {
    const std::int64_t width = columns - tile * n < n ? columns - tile * n : n;
    const T* const dw = own_depthwise + tile * taps * expand * n;
    for (std::int64_t row = 0; row < rows; ++row) {
      T* const own = upstream + row * taps * n;
      at.each([&](std::int64_t t, std::int64_t p) {
        const T* from = g[row][p] + tile * n;
        if (width < n) store_vector(own + t * n, Vector<T>{});
        if (width == n)
          store_vector(own + t * n, load_vector(from));
        else
          for (std::int64_t lane = 0; lane < width; ++lane) own[t * n + lane] = from[lane];
      });
    }
    const std::int64_t row = expand * count * n, place = tile * expand * n;
    in_steps<shared_rows>(rows, [&](std::int64_t first, auto number) {
      in_steps<8>(expand, [&](std::int64_t e, auto expansions) {
        const std::int64_t at_row = first * row + place + e * n;
        pointwise_gradient<T, expansions, number>(upstream + first * taps * n, dw + e * n, expand, taps,
                                                  factors + first, pointwise + at_row, gradient + at_row, row,
                                                  dots + first * n);
      });
    });
    if (grad_depthwise == nullptr) continue;
    T* const sums = grad_depthwise + tile * taps * expand * n;
    in_steps<shared_taps>(taps, [&](std::int64_t t, auto number) {
      in_steps<8>(expand, [&](std::int64_t e, auto expansions) {
        depthwise_gradient<T, expansions, number>(upstream + t * n, taps * n, pointwise + place + e * n, row, factors,
                                                  rows, sums + (t * expand + e) * n, expand);
      });
    });
  }
  for (std::int64_t row = 0; row < rows; ++row) {
    T dot = 0;
    for (std::int64_t lane = 0; lane < n; ++lane) dot += dots[row * n + lane];
    put_scale(block, term, begin + row, dot);
    const T* const own = gradient + row * expand * count * n;
    if (term.grad_b.data != nullptr) store_expanded(own, columns, expand, term.grad_b, begin + row);
  }
}

// Output channels [begin, end) of one group, `rows_at_once` of them at most.
template <class T>
static void backward_rows(const Block& block, const Packed<T>& packed, const Sums<T>& sums, const Piece<T>& piece,
                          T* scratch, std::int64_t begin, std::int64_t end) {
  const std::int64_t columns = block.in_per_group, taps = block.taps();
  T* const spare = scratch + rows_at_once * taps * columns;
  Panel<const T> g[rows_at_once];  // dW
  for (std::int64_t o = begin; o < end; ++o) {
    g[o - begin] = panel<T>(block.kernel, o, columns, taps, scratch + (o - begin) * taps * columns);
    for (std::int32_t index = 0; index < block.terms; ++index) {
      const Term& term = block.term[index];
      const T scale = scale_of<T>(block, term, o);
      if (term.kind == Kind::dense)
        put_scale(block, term, o, dense_backward(block, term, g[o - begin], o, scale, spare));
      else if (term.kind == Kind::pointwise)
        put_scale(block, term, o, pointwise_backward(block, term, g[o - begin], o, scale, sums.filters[index], spare));
      else if (term.kind == Kind::separable && term.b.data == nullptr)
        put_scale(block, term, o, depthwise_backward(block, term, g[o - begin], o, scale));
    }
  }
  Ahead ahead;  // what follows the products, then what comes before the next ones
  add_rows(block, true, begin, end, ahead);
  ahead.add(block.kernel, end, next_rows(block, end), columns * taps);
  add_rows(block, false, end, next_rows(block, end), ahead);
  for (std::int32_t index = 0; index < block.terms; ++index) {
    const Term& term = block.term[index];
    if (term.kind == Kind::separable && term.b.data != nullptr)
      separable_backward(block, term, g, packed.depthwise[index], sums.depthwise[index], spare, begin, end);
    else if (term.kind == Kind::composed)
      composed_backward(block, index, packed.first[index], piece, g, spare, begin, end, ahead);
  }
}

template <class T>
static void backward(const Block& block, const Packed<T>& packed, const Sums<T>& sums, const Piece<T>& piece,
                     T* scratch, std::int64_t begin, std::int64_t end) {
  for (std::int64_t o = begin; o < end; o += rows_at_once)
    backward_rows(block, packed, sums, piece, scratch, o, o + rows_at_once < end ? o + rows_at_once : end);
}
