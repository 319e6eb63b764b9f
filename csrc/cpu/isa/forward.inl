// From terms to a kernel (paper Eq. 4). Included by rows.cpp only, inside its namespace.

// Whether a dense term lies in memory as the block's kernel does: it is added after that is stored, untransposed.
template <class T>
static bool is_added_last(const Block& block, const Term& term) {
  return term.height == block.height && term.width == block.width &&
         same_runs<T>(block.kernel, term.a, block.in_per_group, block.taps());
}

template <class T>
static void unpack(const T* panels, std::int64_t columns, std::int64_t taps, const View& view, std::int64_t begin,
                   std::int64_t end) {
  for (std::int64_t row = begin; row < end; ++row)
    store(panels + row * taps * columns, columns, columns, taps, view, row);
}

// So many taps are summed up at a time.
constexpr std::int64_t summed_taps = 64;

// One output channel: the sums of all terms that have whole rows of input channels, for taps [first, first + count).
// `products`: per term what `compose` made for this channel.
template <class T>
static void forward_sums(const Block& block, Panel<T> w, bool direct, const T* const* products, T* spare,
                         std::int64_t o, std::int64_t first, std::int64_t count) {
  Combination<T> sums[summed_taps];
  const std::int64_t columns = block.in_per_group;
  for (std::int64_t p = 0; p < count; ++p) sums[p].begin(w[first + p], columns);
  const auto add = [&](std::int64_t p, const T* x, T factor) {
    if (p >= first && p < first + count) sums[p - first].add(x, factor);
  };
  for (std::int32_t index = 0; index < block.terms; ++index) {
    const Term& term = block.term[index];
    const Centred at(block, term);
    const T scale = scale_of<T>(block, term, o);
    if (term.kind == Kind::dense && (direct || !is_added_last<T>(block, term))) {
      const Panel<const T> a = panel<T>(term.a, o, columns, at.taps(), spare);
      spare += at.taps() * columns;
      at.each([&](std::int64_t t, std::int64_t p) { add(p, a[t], scale); });
    } else if (term.kind == Kind::pointwise && term.a.data != nullptr) {
      const Panel<const T> a = panel<T>(term.a, o, columns, 1, spare);
      spare += columns;
      const Filter<T> filter(term, o);
      at.each([&](std::int64_t t, std::int64_t p) { add(p, a[0], scale * filter[t]); });
    } else if (term.kind == Kind::composed) {
      const std::int64_t step = padded<T>(width_of(block, term));
      each_meeting(block, term, [&](std::int64_t q, std::int64_t r, std::int64_t p) {
        add(p, products[index] + q * step + r * columns, scale);
      });
    }
  }
  for (std::int64_t p = 0; p < count; ++p) sums[p].end();
}

// One output channel without its separable terms.
template <class T>
static void forward_row(const Block& block, Panel<T> w, bool direct, const T* const* products, T* spare,
                        std::int64_t o) {
  const std::int64_t columns = block.in_per_group, taps = block.taps();
  for (std::int64_t first = 0; first < taps; first += summed_taps)
    forward_sums(block, w, direct, products, spare, o, first, taps - first < summed_taps ? taps - first : summed_taps);
  for (std::int32_t index = 0; index < block.terms; ++index) {  // terms with one input channel per output channel
    const Term& term = block.term[index];
    const Centred at(block, term);
    const T scale = scale_of<T>(block, term, o);
    if (term.kind == Kind::pointwise && term.a.data == nullptr) {
      const Filter<T> filter(term, o);
      at.each([&](std::int64_t t, std::int64_t p) { w[p][o % columns] += scale * filter[t]; });
    } else if (term.kind == Kind::separable && term.b.data == nullptr) {
      const View values = {term.a.data, term.a.row, term.a.tap, 0, term.a.type};  // taps as columns
      at.each([&](std::int64_t t, std::int64_t p) {
        w[p][o / term.inner % columns] += scale * scalar<T>(values, o, t, 0);
      });
    }
  }
}

template <class T>
static void add_as_it_lies(const Block& block, const Term& term, T factor, std::int64_t o) {
  const T* const x = in_place<T>(term.a, o).data;
  combine(in_place<T>(block.kernel, o).data, &x, &factor, 1, true, block.taps() * block.in_per_group);
}

// Output channels [begin, end) of one group, `rows_at_once` of them at most.
template <class T>
static void forward_rows(const Block& block, const Packed<T>& packed, T* scratch, std::int64_t begin,
                         std::int64_t end) {
  const std::int64_t columns = block.in_per_group, taps = block.taps(), group = begin / block.out_per_group();
  const bool direct = is_panel<T>(block.kernel, columns);
  T* const panels = scratch;
  T* spare = scratch + (direct ? 0 : rows_at_once * taps * columns);
  const T* products[max_terms] = {};
  Ahead ahead;  // what follows the products, then the left matrices of the next ones
  add_rows(block, false, begin, end, ahead);
  ahead.add(block.kernel, begin, end, columns * taps);
  add_rows(block, true, end, next_rows(block, end), ahead);
  for (std::int32_t index = 0; index < block.terms; ++index) {
    const Term& term = block.term[index];
    if (term.kind != Kind::composed) continue;
    T* const product = spare;
    spare += rows_at_once * taps_of_b(term) * padded<T>(width_of(block, term));
    compose(block, term, packed.first[index], spare, product, begin, end, ahead);
    products[index] = product;
  }
  Panel<T> w[rows_at_once];
  for (std::int64_t o = begin; o < end; ++o) {
    w[o - begin] = direct ? in_place<T>(block.kernel, o) : Panel<T>{panels + (o - begin) * taps * columns, columns};
    forward_row(block, w[o - begin], direct, products, spare, o);
    for (std::int32_t index = 0; index < block.terms; ++index)
      if (products[index] != nullptr)
        products[index] += taps_of_b(block.term[index]) * padded<T>(width_of(block, block.term[index]));
  }
  for (std::int32_t index = 0; index < block.terms; ++index) {
    const Term& term = block.term[index];
    if (term.kind != Kind::separable || term.b.data == nullptr) continue;
    const Centred at(block, term);
    const std::int64_t own_taps = at.taps(), count = tiles<T>(columns), row = count * lanes<T> * term.inner;
    const T* const dw = packed.depthwise[index] + group * row * own_taps;
    for (std::int64_t o = begin; o < end; ++o) load_expanded(term.b, o, columns, term.inner, spare + (o - begin) * row);
    T factors[rows_at_once];
    for (std::int64_t o = begin; o < end; ++o) factors[o - begin] = scale_of<T>(block, term, o);
    for (std::int64_t tile = 0; tile < count; ++tile)
      in_steps<shared_rows>(end - begin, [&](std::int64_t first, auto number) {
        in_steps<8>(term.inner, [&](std::int64_t e, auto expansions) {
          const std::int64_t place = (tile * term.inner + e) * lanes<T>;
          const T* const d = dw + tile * lanes<T> * term.inner * own_taps + e * lanes<T>;
          add_separable<T, expansions, number>(w + first, at, spare + first * row + place, row, d, term.inner,
                                               factors + first, tile * lanes<T>, columns);
        });
      });
  }
  if (direct) return;
  for (std::int64_t o = begin; o < end; ++o) {
    store(static_cast<const T*>(w[o - begin].data), columns, columns, taps, block.kernel, o);
    for (std::int32_t index = 0; index < block.terms; ++index) {
      const Term& term = block.term[index];
      if (term.kind == Kind::dense && is_added_last<T>(block, term))
        add_as_it_lies(block, term, scale_of<T>(block, term, o), o);
    }
  }
}

template <class T>
static void forward(const Block& block, const Packed<T>& packed, T* scratch, std::int64_t begin, std::int64_t end) {
  for (std::int64_t first = begin; first < end;) {
    const std::int64_t group_end = (first / block.out_per_group() + 1) * block.out_per_group();
    std::int64_t last = first + rows_at_once < group_end ? first + rows_at_once : group_end;
    if (last > end) last = end;
    forward_rows(block, packed, scratch, first, last);
    first = last;
  }
}
