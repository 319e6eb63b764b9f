// Forward: the kernel as the sum of all terms (paper Eq. 4).

// Return whether a dense term has the kernel's layout in memory: it is then added to the stored kernel, without panels.
template <class T>
static bool has_kernel_layout(const Block& block, const Term& term) {
  return term.height == block.height && term.width == block.width &&
         same_dense_layout<T>(block.kernel, term.a, block.in_per_group, block.taps());
}

template <class T>
static void unpack(const T* panels, std::int64_t columns, std::int64_t taps, const View& view, std::int64_t begin,
                   std::int64_t end) {
  for (std::int64_t row = begin; row < end; ++row)
    store(panels + row * taps * columns, columns, columns, taps, view, row);
}

// Taps that are summed in one pass over the terms.
constexpr std::int64_t taps_per_pass = 64;

// Sum the terms with whole rows of input channels for one output channel and taps [first, first + count). `products`:
// per term, the result of `compose` for this channel.
template <class T>
static void forward_sums(const Block& block, Panel<T> w, bool direct, const T* const* products, T* spare,
                         std::int64_t o, std::int64_t first, std::int64_t count) {
  Combination<T> sums[taps_per_pass];
  const std::int64_t columns = block.in_per_group;
  for (std::int64_t p = 0; p < count; ++p) sums[p].begin(w[first + p], columns);
  const auto add = [&](std::int64_t p, const T* x, T factor) {
    if (p >= first && p < first + count) sums[p - first].add(x, factor);
  };
  for (std::int32_t index = 0; index < block.terms; ++index) {
    const Term& term = block.term[index];
    const Window window(block, term);
    const T scale = scale_of<T>(block, term, o);
    if (term.kind == Kind::dense && (direct || !has_kernel_layout<T>(block, term))) {
      const Panel<const T> a = load_panel<T>(term.a, o, columns, window.taps(), spare);
      spare += window.taps() * columns;
      window.each([&](std::int64_t t, std::int64_t p) { add(p, a[t], scale); });
    } else if (term.kind == Kind::pointwise && term.a.data != nullptr) {
      const Panel<const T> a = load_panel<T>(term.a, o, columns, 1, spare);
      spare += columns;
      const Filter<T> filter(term, o);
      window.each([&](std::int64_t t, std::int64_t p) { add(p, a[0], scale * filter[t]); });
    } else if (term.kind == Kind::composed) {
      const std::int64_t step = padded<T>(columns_of_first(block, term));
      each_tap_pair(block, term, [&](std::int64_t q, std::int64_t r, std::int64_t p) {
        add(p, products[index] + q * step + r * columns, scale);
      });
    }
  }
  for (std::int64_t p = 0; p < count; ++p) sums[p].end();
}

// Sum all terms but the separable ones for one output channel.
template <class T>
static void forward_row(const Block& block, Panel<T> w, bool direct, const T* const* products, T* spare,
                        std::int64_t o) {
  const std::int64_t columns = block.in_per_group, taps = block.taps();
  for (std::int64_t first = 0; first < taps; first += taps_per_pass)
    forward_sums(block, w, direct, products, spare, o, first,
                 taps - first < taps_per_pass ? taps - first : taps_per_pass);
  for (std::int32_t index = 0; index < block.terms; ++index) {  // terms with one input channel per output channel
    const Term& term = block.term[index];
    const Window window(block, term);
    const T scale = scale_of<T>(block, term, o);
    if (term.kind == Kind::pointwise && term.a.data == nullptr) {
      const Filter<T> filter(term, o);
      window.each([&](std::int64_t t, std::int64_t p) { w[p][o % columns] += scale * filter[t]; });
    } else if (term.kind == Kind::separable && term.b.data == nullptr) {
      const View values = taps_as_columns(term.a);
      window.each([&](std::int64_t t, std::int64_t p) {
        w[p][o / term.inner % columns] += scale * load_scalar<T>(values, o, t, 0);
      });
    }
  }
}

template <class T>
static void add_in_place(const Block& block, const Term& term, T factor, std::int64_t o) {
  const T* const x = panel_in_place<T>(term.a, o).data;
  combine(panel_in_place<T>(block.kernel, o).data, &x, &factor, 1, true, block.taps() * block.in_per_group);
}

// Compute the kernel for output channels [begin, end) of one group, at most `channel_block` of them.
template <class T>
static void forward_rows(const Block& block, const Packed<T>& packed, T* scratch, std::int64_t begin,
                         std::int64_t end) {
  const std::int64_t columns = block.in_per_group, taps = block.taps(), group = begin / block.out_per_group();
  const bool direct = has_panel_layout<T>(block.kernel, columns);
  T* const panels = scratch;
  T* spare = scratch + (direct ? 0 : channel_block * taps * columns);
  const T* products[max_terms] = {};
  Prefetcher prefetcher;  // first the steps after these products, then the left matrices of the next products
  prefetch_rows(block, false, begin, end, prefetcher);
  prefetcher.add(block.kernel, begin, end, columns * taps);
  prefetch_rows(block, true, end, next_block_end(block, end), prefetcher);
  for (std::int32_t index = 0; index < block.terms; ++index) {
    const Term& term = block.term[index];
    if (term.kind != Kind::composed) continue;
    T* const product = spare;
    spare += channel_block * term.second_taps() * padded<T>(columns_of_first(block, term));
    compose(block, term, packed.first[index], spare, product, begin, end, prefetcher);
    products[index] = product;
  }
  Panel<T> w[channel_block];
  for (std::int64_t o = begin; o < end; ++o) {
    w[o - begin] =
        direct ? panel_in_place<T>(block.kernel, o) : Panel<T>{panels + (o - begin) * taps * columns, columns};
    forward_row(block, w[o - begin], direct, products, spare, o);
    for (std::int32_t index = 0; index < block.terms; ++index)
      if (products[index] != nullptr)
        products[index] += block.term[index].second_taps() * padded<T>(columns_of_first(block, block.term[index]));
  }
  for (std::int32_t index = 0; index < block.terms; ++index) {
    const Term& term = block.term[index];
    if (term.kind != Kind::separable || term.b.data == nullptr) continue;
    const Window window(block, term);
    const std::int64_t term_taps = window.taps(), count = tiles<T>(columns), row = count * lanes<T> * term.inner;
    const T* const dw = packed.depthwise[index] + group * row * term_taps;
    for (std::int64_t o = begin; o < end; ++o)
      load_pointwise(term.b, o, columns, term.inner, spare + (o - begin) * row);
    T factors[channel_block];
    for (std::int64_t o = begin; o < end; ++o) factors[o - begin] = scale_of<T>(block, term, o);
    for (std::int64_t tile = 0; tile < count; ++tile)
      each_step<rows_per_step>(end - begin, [&](std::int64_t first, auto number) {
        each_step<8>(term.inner, [&](std::int64_t e, auto expansions) {
          const std::int64_t offset = (tile * term.inner + e) * lanes<T>;
          const T* const d = dw + tile * lanes<T> * term.inner * term_taps + e * lanes<T>;
          add_separable<T, expansions, number>(w + first, window, spare + first * row + offset, row, d, term.inner,
                                               factors + first, tile * lanes<T>, columns);
        });
      });
  }
  if (direct) return;
  for (std::int64_t o = begin; o < end; ++o) {
    store(static_cast<const T*>(w[o - begin].data), columns, columns, taps, block.kernel, o);
    for (std::int32_t index = 0; index < block.terms; ++index) {
      const Term& term = block.term[index];
      if (term.kind == Kind::dense && has_kernel_layout<T>(block, term))
        add_in_place(block, term, scale_of<T>(block, term, o), o);
    }
  }
}

template <class T>
static void forward(const Block& block, const Packed<T>& packed, T* scratch, std::int64_t begin, std::int64_t end) {
  for (std::int64_t first = begin; first < end;) {
    const std::int64_t group_end = (first / block.out_per_group() + 1) * block.out_per_group();
    std::int64_t last = first + channel_block < group_end ? first + channel_block : group_end;
    if (last > end) last = end;
    forward_rows(block, packed, scratch, first, last);
    first = last;
  }
}
