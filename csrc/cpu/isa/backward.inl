// Backward: the gradients of all terms, given that of the kernel.

template <class T>
static T dense_backward(const Block& block, const Term& term, Panel<const T> g, std::int64_t o, T scale, T* spare) {
  const std::int64_t columns = block.in_per_group, taps = block.taps();
  const Window window(block, term);
  const bool needs_grad = term.grad_a.data != nullptr;
  if (window.taps() == taps && same_dense_layout<T>(block.kernel, term.a, columns, taps) &&
      (!needs_grad || same_dense_layout<T>(block.kernel, term.grad_a, columns, taps))) {
    const T *const upstream = panel_in_place<T>(block.kernel, o).data, *const a = panel_in_place<T>(term.a, o).data;
    if (!needs_grad) return dot(upstream, a, taps * columns);
    return scale_into_and_dot(panel_in_place<T>(term.grad_a, o).data, upstream, a, scale, taps * columns);
  }
  const Panel<const T> a = load_panel<T>(term.a, o, columns, window.taps(), spare);
  const bool direct = needs_grad && has_panel_layout<T>(term.grad_a, columns);
  const Panel<T> out = direct ? panel_in_place<T>(term.grad_a, o) : Panel<T>{spare + window.taps() * columns, columns};
  T sum = 0;
  window.each([&](std::int64_t t, std::int64_t p) { sum += scale_into_and_dot(out[t], g[p], a[t], scale, columns); });
  if (needs_grad && !direct) store(static_cast<const T*>(out.data), columns, columns, window.taps(), term.grad_a, o);
  return sum;
}

template <class T>
static T pointwise_backward(const Block& block, const Term& term, Panel<const T> g, std::int64_t o, T scale, T* filters,
                            T* spare) {
  const std::int64_t columns = block.in_per_group;
  const Window window(block, term);
  const Filter<T> filter(term, o);
  if (term.a.data == nullptr) {
    T sum = 0;
    window.each([&](std::int64_t t, std::int64_t p) {
      const T value = g[p][o % columns];
      if (filters != nullptr) filters[o * window.taps() + t] = scale * value;
      sum += filter[t] * value;
    });
    return sum;
  }
  T *const filtered = spare, *const copy = spare + columns, *const gradient = spare + 2 * columns;
  const Panel<const T> a = load_panel<T>(term.a, o, columns, 1, copy);
  Combination<T> sum;
  sum.begin(filtered, columns);
  window.each([&](std::int64_t t, std::int64_t p) {
    sum.add(g[p], filter[t]);
    if (filters != nullptr) filters[o * window.taps() + t] = scale * dot(g[p], a[0], columns);
  });
  sum.end();
  if (term.grad_a.data == nullptr) return dot(static_cast<const T*>(filtered), a[0], columns);
  const bool direct = has_panel_layout<T>(term.grad_a, columns);
  T* const out = direct ? panel_in_place<T>(term.grad_a, o).data : gradient;
  const T result = scale_into_and_dot(out, static_cast<const T*>(filtered), a[0], scale, columns);
  if (!direct) store(static_cast<const T*>(out), columns, columns, 1, term.grad_a, o);
  return result;
}

// A depthwise convolution without a pointwise one: one input channel per output channel.
template <class T>
static T depthwise_backward(const Block& block, const Term& term, Panel<const T> g, std::int64_t o, T scale) {
  const Window window(block, term);
  const View values = taps_as_columns(term.a), gradient = taps_as_columns(term.grad_a);
  T sum = 0;
  window.each([&](std::int64_t t, std::int64_t p) {
    const T value = g[p][o / term.inner % block.in_per_group];
    sum += value * load_scalar<T>(values, o, t, 0);
    if (gradient.data != nullptr) store_scalar(gradient, o, t, scale * value);
  });
  return sum;
}

// Output channels [begin, end), at most `channel_block` of them, so that each input tile is loaded once for all of
// them.
template <class T>
static void separable_backward(const Block& block, const Term& term, const Panel<const T>* g, const T* depthwise,
                               T* grad_depthwise, T* scratch, std::int64_t begin, std::int64_t end) {
  constexpr std::int64_t n = lanes<T>;
  const std::int64_t columns = block.in_per_group, expand = term.inner, count = tiles<T>(columns), rows = end - begin;
  const Window window(block, term);
  const std::int64_t taps = window.taps(), group = begin / block.out_per_group();
  T *const pointwise = scratch, *const gradient = pointwise + rows * expand * count * n;  // [row][tile][e][lane]
  T* const upstream = gradient + rows * expand * count * n;                               // [row][tap][lane]
  T factors[channel_block], dots[channel_block * n] = {};
  for (std::int64_t row = 0; row < rows; ++row) {
    load_pointwise(term.b, begin + row, columns, expand, pointwise + row * expand * count * n);
    factors[row] = scale_of<T>(block, term, begin + row);
  }
  const T* const group_depthwise = depthwise + group * count * n * taps * expand;
  for (std::int64_t tile = 0; tile < count; ++tile) {
    const std::int64_t width = columns - tile * n < n ? columns - tile * n : n;
    const T* const dw = group_depthwise + tile * taps * expand * n;
    for (std::int64_t row = 0; row < rows; ++row) {
      T* const panel = upstream + row * taps * n;
      window.each([&](std::int64_t t, std::int64_t p) {
        const T* from = g[row][p] + tile * n;
        if (width < n) store_vector(panel + t * n, Vector<T>{});
        if (width == n)
          store_vector(panel + t * n, load_vector(from));
        else
          for (std::int64_t lane = 0; lane < width; ++lane) panel[t * n + lane] = from[lane];
      });
    }
    const std::int64_t row = expand * count * n, offset = tile * expand * n;
    each_step<rows_per_step>(rows, [&](std::int64_t first, auto number) {
      each_step<8>(expand, [&](std::int64_t e, auto expansions) {
        const std::int64_t at_row = first * row + offset + e * n;
        pointwise_gradient<T, expansions, number>(upstream + first * taps * n, dw + e * n, expand, taps,
                                                  factors + first, pointwise + at_row, gradient + at_row, row,
                                                  dots + first * n);
      });
    });
    if (grad_depthwise == nullptr) continue;
    T* const sums = grad_depthwise + tile * taps * expand * n;
    each_step<taps_per_step>(taps, [&](std::int64_t t, auto number) {
      each_step<8>(expand, [&](std::int64_t e, auto expansions) {
        depthwise_gradient<T, expansions, number>(upstream + t * n, taps * n, pointwise + offset + e * n, row, factors,
                                                  rows, sums + (t * expand + e) * n, expand);
      });
    });
  }
  for (std::int64_t row = 0; row < rows; ++row) {
    T dot = 0;
    for (std::int64_t lane = 0; lane < n; ++lane) dot += dots[row * n + lane];
    store_scale_gradient(block, term, begin + row, dot);
    const T* const row_gradient = gradient + row * expand * count * n;
    if (term.grad_b.data != nullptr) store_pointwise(row_gradient, columns, expand, term.grad_b, begin + row);
  }
}

// Output channels [begin, end) of one group, at most `channel_block` of them.
template <class T>
static void backward_rows(const Block& block, const Packed<T>& packed, const ChannelSums<T>& sums,
                          const Chunk<T>& chunk, T* scratch, std::int64_t begin, std::int64_t end) {
  const std::int64_t columns = block.in_per_group, taps = block.taps();
  T* const spare = scratch + channel_block * taps * columns;
  Panel<const T> g[channel_block];  // dW
  for (std::int64_t o = begin; o < end; ++o) {
    g[o - begin] = load_panel<T>(block.kernel, o, columns, taps, scratch + (o - begin) * taps * columns);
    for (std::int32_t index = 0; index < block.terms; ++index) {
      const Term& term = block.term[index];
      const T scale = scale_of<T>(block, term, o);
      if (term.kind == Kind::dense)
        store_scale_gradient(block, term, o, dense_backward(block, term, g[o - begin], o, scale, spare));
      else if (term.kind == Kind::pointwise)
        store_scale_gradient(block, term, o,
                             pointwise_backward(block, term, g[o - begin], o, scale, sums.filters[index], spare));
      else if (term.kind == Kind::separable && term.b.data == nullptr)
        store_scale_gradient(block, term, o, depthwise_backward(block, term, g[o - begin], o, scale));
    }
  }
  Prefetcher prefetcher;  // first the steps after these products, then those before the next products
  prefetch_rows(block, true, begin, end, prefetcher);
  prefetcher.add(block.kernel, end, next_block_end(block, end), columns * taps);
  prefetch_rows(block, false, end, next_block_end(block, end), prefetcher);
  for (std::int32_t index = 0; index < block.terms; ++index) {
    const Term& term = block.term[index];
    if (term.kind == Kind::separable && term.b.data != nullptr)
      separable_backward(block, term, g, packed.depthwise[index], sums.depthwise[index], spare, begin, end);
    else if (term.kind == Kind::composed)
      composed_backward(block, index, packed.first[index], chunk, g, spare, begin, end, prefetcher);
  }
}

template <class T>
static void backward(const Block& block, const Packed<T>& packed, const ChannelSums<T>& sums, const Chunk<T>& chunk,
                     T* scratch, std::int64_t begin, std::int64_t end) {
  for (std::int64_t o = begin; o < end; o += channel_block)
    backward_rows(block, packed, sums, chunk, scratch, o, o + channel_block < end ? o + channel_block : end);
}
