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

// Output channels [begin, end), `separable_rows` of them at most: one input tile is worked on for all of them.
template <class T>
static void separable_backward(const Block& block, const Term& term, const T* panels, const T* depthwise,
                               T* grad_depthwise, T* scratch, std::int64_t begin, std::int64_t end) {
  constexpr std::int64_t n = lanes<T>;
  const std::int64_t columns = block.in_per_group, expand = term.inner, count = tiles<T>(columns), rows = end - begin;
  const Centred at(block, term);
  const std::int64_t taps = at.taps(), group = begin / block.out_per_group();
  T *const pointwise = scratch, *const gradient = pointwise + rows * expand * count * n;  // [row][tile][e][lane]
  T* const upstream = gradient + rows * expand * count * n;                               // [row][tap][lane]
  T factors[separable_rows];
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
        const T* from = panels + ((begin + row) * block.taps() + p) * columns + tile * n;
        if (width < n) store_vector(own + t * n, Vector<T>{});
        if (width == n)
          store_vector(own + t * n, load_vector(from));
        else
          for (std::int64_t lane = 0; lane < width; ++lane) own[t * n + lane] = from[lane];
      });
      T* const to = gradient + (row * count + tile) * expand * n;
      std::int64_t e = 0;
      for (; e + 8 <= expand; e += 8) pointwise_gradient<T, 8>(own, dw + e * n, expand, taps, to + e * n);
      for (; e < expand; ++e) pointwise_gradient<T, 1>(own, dw + e * n, expand, taps, to + e * n);
    }
    if (grad_depthwise == nullptr) continue;
    T* const sums = grad_depthwise + tile * taps * expand * n;
    const T* const own = pointwise + tile * expand * n;
    for (std::int64_t t = 0; t < taps; ++t) {
      std::int64_t e = 0;
      for (; e + 8 <= expand; e += 8)
        depthwise_gradient<T, 8>(upstream + t * n, taps * n, own + e * n, expand * count * n, factors, rows,
                                 sums + (t * expand + e) * n);
      for (; e < expand; ++e)
        depthwise_gradient<T, 1>(upstream + t * n, taps * n, own + e * n, expand * count * n, factors, rows,
                                 sums + (t * expand + e) * n);
    }
  }
  for (std::int64_t row = 0; row < rows; ++row) {
    const std::int64_t size = expand * count * n;
    T* const own = gradient + row * size;
    put_scale(block, term, begin + row, dot(static_cast<const T*>(own), pointwise + row * size, size));
    if (term.grad_b.data == nullptr) continue;
    for (std::int64_t i = 0; i < size; ++i) own[i] *= factors[row];
    store_expanded(static_cast<const T*>(own), columns, expand, term.grad_b, begin + row);
  }
}

template <class T>
static void backward(const Block& block, T* panels, const T* const* depthwise, T* const* grad_depthwise,
                     T* const* grad_filters, T* scratch, std::int64_t begin, std::int64_t end) {
  const std::int64_t columns = block.in_per_group, taps = block.taps();
  for (std::int64_t o = begin; o < end; ++o) {
    T* const own = panels + o * taps * columns;
    if (static_cast<void*>(panels) != block.kernel.data) load(block.kernel, o, columns, taps, own, columns);
    const Panel<const T> g{own, columns};
    for (std::int32_t index = 0; index < block.terms; ++index) {
      const Term& term = block.term[index];
      const T scale = scale_of<T>(block, term, o);
      if (term.kind == Kind::dense)
        put_scale(block, term, o, dense_backward(block, term, g, o, scale, scratch));
      else if (term.kind == Kind::pointwise)
        put_scale(block, term, o, pointwise_backward(block, term, g, o, scale, grad_filters[index], scratch));
      else if (term.kind == Kind::separable && term.b.data == nullptr)
        put_scale(block, term, o, depthwise_backward(block, term, g, o, scale));
    }
  }
  for (std::int32_t index = 0; index < block.terms; ++index) {
    const Term& term = block.term[index];
    if (term.kind != Kind::separable || term.b.data == nullptr) continue;
    for (std::int64_t o = begin; o < end; o += separable_rows)
      separable_backward(block, term, static_cast<const T*>(panels), depthwise[index], grad_depthwise[index], scratch,
                         o, o + separable_rows < end ? o + separable_rows : end);
  }
}

template <class T>
static void composed_backward(const Block& block, const Term& term, const T* panels, const T* product, T* scratch,
                              std::int64_t begin, std::int64_t end) {
  const std::int64_t columns = block.in_per_group, inner = term.inner, b_taps = taps_of_b(term);
  const Centred at(block, term);
  const bool as_they_lie = term.grad_b.data != nullptr && same_runs<T>(term.b, term.grad_b, inner, b_taps);
  T *const sum_panel = scratch, *const spare = scratch + b_taps * inner;
  for (std::int64_t o = begin; o < end; ++o) {
    const T* u = product + o * b_taps * inner;
    if (term.identity) {
      at.each([&](std::int64_t q, std::int64_t p) {  // of b: a is a 1x1
        for (std::int64_t m = 0; m < inner; m += columns) {
          const T* __restrict g = panels + (o * block.taps() + p) * columns;
          T* __restrict out = sum_panel + q * inner + m;
          const T* __restrict from = product + (o * b_taps + q) * inner + m;
          for (std::int64_t i = 0; i < columns; ++i) out[i] = from[i] + g[i];
        }
      });
      u = sum_panel;
    }
    const T scale = scale_of<T>(block, term, o);
    if (as_they_lie) {
      store(u, inner, inner, b_taps, term.grad_b, o);
      T* __restrict out = in_place<T>(term.grad_b, o).data;
      const T* __restrict b = in_place<T>(term.b, o).data;
      T sum = 0;
#pragma omp simd reduction(+ : sum)
      for (std::int64_t i = 0; i < b_taps * inner; ++i) {
        sum += out[i] * b[i];
        out[i] *= scale;
      }
      put_scale(block, term, o, sum);
      continue;
    }
    const Panel<const T> b = panel<T>(term.b, o, inner, b_taps, spare);
    const bool direct = term.grad_b.data != nullptr && is_panel<T>(term.grad_b, inner);
    const Panel<T> out = direct ? in_place<T>(term.grad_b, o) : Panel<T>{spare + b_taps * inner, inner};
    T sum = 0;
    for (std::int64_t q = 0; q < b_taps; ++q) sum += set_and_dot(out[q], u + q * inner, b[q], scale, inner);
    put_scale(block, term, o, sum);
    if (term.grad_b.data != nullptr && !direct)
      store(static_cast<const T*>(out.data), inner, inner, b_taps, term.grad_b, o);
  }
}

template <class T>
static void gather(const Block& block, const Term& term, const T* panels, T* out, std::int64_t begin,
                   std::int64_t end) {
  const std::int64_t columns = block.in_per_group, a_taps = taps_of_a(term), b_taps = taps_of_b(term);
  for (std::int64_t o = begin; o < end; ++o)
    each_meeting(block, term, [&](std::int64_t q, std::int64_t r, std::int64_t p) {
      std::memcpy(out + ((o * b_taps + q) * a_taps + r) * columns, panels + (o * block.taps() + p) * columns,
                  columns * sizeof(T));
    });
}
