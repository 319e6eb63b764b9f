// Composed terms (paper Eq. 3) as matrix products.
//
// Per group, with c a tap of a and an input channel (`columns_of_first` of them), (o, q) an output channel and a tap of
// b, and im2col[(o, q), c] the element of dW that both taps contribute to:
//   kernel         b [(o, q), inner] @ a [inner, c], whose rows are then added up at the block's taps
//   gradient of b  im2col [(o, q), c] @ a^T [c, inner]
//   gradient of a  b^T [inner, (o, q)] @ im2col [(o, q), c]
// Left matrices are read in place, right matrices are packed.

// Call f(q, r, p) for each tap q of b and r of a, and the block's tap p that they contribute to.
template <class F>
static void each_tap_pair(const Block& block, const Term& term, F f) {
  const std::int64_t b_height = term.second_height(), b_width = term.second_width();
  const Window window(block, term);
  for (std::int64_t qh = 0; qh < b_height; ++qh)
    for (std::int64_t qw = 0; qw < b_width; ++qw)
      for (std::int64_t rh = 0; rh < term.first_height; ++rh)
        for (std::int64_t rw = 0; rw < term.first_width; ++rw)
          f(qh * b_width + qw, rh * term.first_width + rw,
            (window.top + qh + rh) * window.block_width + window.left + qw + rw);
}

// --- a, as a right matrix -------------------------------------------------------------------------------------------

template <class T>
static void pack_first(const Block& block, const Term& term, std::int64_t group, bool transposed, T* out,
                       std::int64_t begin, std::int64_t end) {
  constexpr std::int64_t n = tile_width<T>;
  const std::int64_t columns = block.in_per_group, a_taps = term.first_taps(), inner = term.inner;
  dispatch_type(term.a.type, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    const View& a = term.a;
    const S* const from = static_cast<const S*>(a.data) + group * inner * a.row;
    if (transposed) {
      const std::int64_t width = a_taps * columns;
      for (std::int64_t m = begin * n; m < end * n; ++m) {
        T* to = out + m / n * width * n + m % n;
        const S* const row = from + m * a.row;
        for (std::int64_t r = 0; r < a_taps; ++r)
          for (std::int64_t i = 0; i < columns; ++i, to += n)
            *to = m < inner ? static_cast<T>(row[i * a.column + r * a.tap]) : T{0};
        if (term.identity && m < inner) out[(m / n * width + m % columns) * n + m % n] += 1;
      }
      return;
    }
    for (std::int64_t tile = begin; tile < end; ++tile)
      for (std::int64_t m = 0; m < inner; ++m) {
        T* const to = out + (tile * inner + m) * n;
        std::int64_t r = tile * n / columns, i = tile * n % columns;
        const S* __restrict row = from + m * a.row;
        if (a.column == 1 && r < a_taps && i + n <= columns) {
          for (std::int64_t lane = 0; lane < n; ++lane) to[lane] = static_cast<T>(row[r * a.tap + i + lane]);
        } else {
          for (std::int64_t lane = 0; lane < n; ++lane) {
            to[lane] = r < a_taps ? static_cast<T>(row[i * a.column + r * a.tap]) : T{0};
            if (++i == columns) i = 0, ++r;
          }
        }
        if (!term.identity) continue;
        const std::int64_t lane = m % columns - tile * n;
        if (lane >= 0 && lane < n) to[lane] += 1;
      }
  });
}

template <class T>
static void unpack_first(const Block& block, const Term& term, std::int64_t group, const T* total, std::int64_t begin,
                         std::int64_t end) {
  const std::int64_t columns = block.in_per_group, step = padded<T>(columns_of_first(block, term));
  for (std::int64_t m = begin; m < end; ++m)
    store(total + m * step, columns, columns, term.first_taps(), term.grad_a, group * term.inner + m);
}

// --- b and dW, as left matrices -------------------------------------------------------------------------------------

// Element (o, q, c) is at data + o * row + q * tap + c * column, with o relative to the first channel of the matrix.
template <class T>
struct LeftMatrix {
  const T* data;
  std::int64_t row, tap, column;

  LeftRows<T> rows(std::int64_t taps) const { return {data, taps, row, tap}; }
};

template <class T>
static LeftMatrix<T> matrix_in_place(const View& view, std::int64_t first) {
  return {static_cast<const T*>(view.data) + first * view.row, view.row, view.tap, view.column};
}

// Return rows of output channels [begin, end) as T: the tensor's own memory, or a copy in `copy`.
template <class T>
static LeftMatrix<T> load_matrix(const View& view, std::int64_t begin, std::int64_t end, std::int64_t columns,
                                 std::int64_t taps, T* copy) {
  if (view.type == type_of<T>) return matrix_in_place<T>(view, begin);
  for (std::int64_t o = begin; o < end; ++o) load(view, o, columns, taps, copy + (o - begin) * taps * columns, columns);
  return {copy, taps * columns, columns, 1};
}

// Return im2col of output channels [begin, end), given dW as panels: dW's own memory, or a copy in `copy`.
template <class T>
static LeftMatrix<T> im2col_of(const Block& block, const Term& term, const Panel<const T>* g, std::int64_t begin,
                               std::int64_t end, T* copy) {
  const std::int64_t columns = block.in_per_group, a_taps = term.first_taps(),
                     row = term.second_taps() * a_taps * columns;
  if (block.kernel.type == type_of<T> && a_taps == 1 && term.height == block.height && term.width == block.width)
    return matrix_in_place<T>(block.kernel, begin);
  for (std::int64_t o = begin; o < end; ++o)
    each_tap_pair(block, term, [&](std::int64_t q, std::int64_t r, std::int64_t p) {
      T* const to = copy + (o - begin) * row + (q * a_taps + r) * columns;
      std::memcpy(to, g[o - begin][p], columns * sizeof(T));
    });
  return {copy, row, a_taps * columns, 1};
}

// --- prefetching ----------------------------------------------------------------------------------------------------

// Add rows of all composed terms, or of all others, to `prefetcher`.
static void prefetch_rows(const Block& block, bool composed, std::int64_t begin, std::int64_t end,
                          Prefetcher& prefetcher) {
  for (std::int32_t index = 0; index < block.terms; ++index) {
    const Term& term = block.term[index];
    if ((term.kind == Kind::composed) != composed) continue;
    const ChannelRows rows = channel_rows(block, term);
    prefetcher.add(rows.factor, begin, end, rows.elements);
    prefetcher.add(rows.gradient, begin, end, rows.elements);
  }
}

// The end of the block of output channels after `end`.
static std::int64_t next_block_end(const Block& block, std::int64_t end) {
  return end + channel_block < block.out_channels ? end + channel_block : block.out_channels;
}

// --- products -------------------------------------------------------------------------------------------------------

// Compute out [(o, q)][c, padded] for output channels [begin, end) of one group.
template <class T>
static void compose(const Block& block, const Term& term, const T* first, T* scratch, T* out, std::int64_t begin,
                    std::int64_t end, Prefetcher& prefetcher) {
  const std::int64_t width = columns_of_first(block, term), taps = term.second_taps(), inner = term.inner;
  const LeftMatrix<T> b = load_matrix(term.b, begin, end, inner, taps, scratch);
  const T* const group_first = first + begin / block.out_per_group() * inner * padded<T>(width);
  gemm(b.rows(taps), (end - begin) * taps, Depth::line(inner, b.column), group_first, column_tiles<T>(width), out,
       padded<T>(width), false, prefetcher);
}

// Store the gradients of b and of the scale for one output channel, given u = im2col a^T, [q][inner, padded].
template <class T>
static void second_backward(const Block& block, const Term& term, const T* u, std::int64_t o, T* scratch) {
  const std::int64_t inner = term.inner, taps = term.second_taps(), step = padded<T>(inner);
  const T scale = scale_of<T>(block, term, o);
  if (term.grad_b.data != nullptr && same_dense_layout<T>(term.b, term.grad_b, inner, taps)) {
    store(u, step, inner, taps, term.grad_b, o);
    T* const out = panel_in_place<T>(term.grad_b, o).data;
    store_scale_gradient(
        block, term, o,
        scale_and_dot(out, static_cast<const T*>(panel_in_place<T>(term.b, o).data), scale, taps * inner));
    return;
  }
  const Panel<const T> b = load_panel<T>(term.b, o, inner, taps, scratch);
  const bool direct = term.grad_b.data != nullptr && has_panel_layout<T>(term.grad_b, inner);
  const Panel<T> out = direct ? panel_in_place<T>(term.grad_b, o) : Panel<T>{scratch + taps * inner, inner};
  T sum = 0;
  for (std::int64_t q = 0; q < taps; ++q) sum += scale_into_and_dot(out[q], u + q * step, b[q], scale, inner);
  store_scale_gradient(block, term, o, sum);
  if (term.grad_b.data != nullptr && !direct)
    store(static_cast<const T*>(out.data), inner, inner, taps, term.grad_b, o);
}

// Pack im2col of one output channel times its scale as rows `first_row` and following of a right matrix [(o, q), c],
// which has `depth` rows.
template <class T>
static void pack_im2col(const Block& block, const Term& term, const Panel<const T>& g, T scale, std::int64_t first_row,
                        std::int64_t depth, T* out) {
  constexpr std::int64_t n = tile_width<T>;
  const std::int64_t columns = block.in_per_group, width = columns_of_first(block, term);
  each_tap_pair(block, term, [&](std::int64_t q, std::int64_t r, std::int64_t p) {
    T* const row = out + (first_row + q) * n;  // of the first tile; tiles are `depth` rows apart
    const T* __restrict from = g[p];
    for (std::int64_t i = 0, c = r * columns; i < columns;) {
      const std::int64_t lane = c % n, count = n - lane < columns - i ? n - lane : columns - i;
      T* __restrict to = row + c / n * depth * n + lane;
      if (count == n) {
#pragma GCC unroll 2
        for (int v = 0; v < tile_vectors; ++v)
          store_vector(to + v * lanes<T>, load_vector(from + i + v * lanes<T>) * scale);
      } else {
        for (std::int64_t j = 0; j < count; ++j) to[j] = scale * from[i + j];
      }
      i += count;
      c += count;
    }
  });
  if (width % n == 0) return;
  T* const last = out + width / n * depth * n + first_row * n;
  for (std::int64_t q = 0; q < term.second_taps(); ++q)
    for (std::int64_t lane = width % n; lane < n; ++lane) last[q * n + lane] = 0;
}

// A chunk's output channels of one group, and their memory in the chunk.
template <class T>
struct GroupPart {
  std::int64_t begin, end;
  T *im2col, *second;

  GroupPart(const Block& block, const Chunk<T>& chunk, std::int32_t index, std::int64_t group) {
    const std::int64_t rows = block.out_per_group();
    begin = group * rows > chunk.begin ? group * rows : chunk.begin;
    end = (group + 1) * rows < chunk.end ? (group + 1) * rows : chunk.end;
    const Term& term = block.term[index];
    const std::int64_t offset = (begin - chunk.begin) * term.second_taps();
    im2col = chunk.im2col[index] + offset * padded<T>(columns_of_first(block, term));
    second = chunk.second[index] == nullptr ? nullptr : chunk.second[index] + offset * term.inner;
  }
};

// Gradients of one composed term for output channels [begin, end) of one group, at most `channel_block` of them, given
// dW as panels: b and the scale are finished, a's contribution is packed into `chunk`.
template <class T>
static void composed_backward(const Block& block, std::int32_t index, const T* first, const Chunk<T>& chunk,
                              const Panel<const T>* g, T* scratch, std::int64_t begin, std::int64_t end,
                              Prefetcher& prefetcher) {
  const Term& term = block.term[index];
  const std::int64_t width = columns_of_first(block, term), taps = term.second_taps(), inner = term.inner;
  const std::int64_t group = begin / block.out_per_group();
  if (term.grad_b.data != nullptr || block.needs_scale_grad(term)) {
    const std::int64_t step = padded<T>(inner);
    T* const spare = scratch + channel_block * taps * step;
    const LeftMatrix<T> im2col = im2col_of(block, term, g, begin, end, spare);
    gemm(im2col.rows(taps), (end - begin) * taps, Depth::line(width, im2col.column), first + group * width * step,
         column_tiles<T>(inner), scratch, step, false, prefetcher);
    for (std::int64_t o = begin; o < end; ++o)
      second_backward(block, term, scratch + (o - begin) * taps * step, o, spare);
  }
  if (chunk.im2col[index] == nullptr) return;
  const GroupPart<T> part(block, chunk, index, group);
  const std::int64_t depth = (part.end - part.begin) * taps;
  for (std::int64_t o = begin; o < end; ++o)
    pack_im2col(block, term, g[o - begin], scale_of<T>(block, term, o), (o - part.begin) * taps, depth, part.im2col);
  if (part.second != nullptr)
    load_matrix(term.b, begin, end, inner, taps, part.second + (begin - part.begin) * taps * inner);
}

template <class T>
static void first_gradient(const Block& block, const Chunk<T>& chunk, std::int32_t index, std::int64_t group, T* total,
                           bool accumulate, std::int64_t begin, std::int64_t end) {
  const Term& term = block.term[index];
  const GroupPart<T> part(block, chunk, index, group);
  const std::int64_t width = columns_of_first(block, term), step = padded<T>(width), taps = term.second_taps();
  const LeftMatrix<T> b = part.second == nullptr ? matrix_in_place<T>(term.b, part.begin)
                                                 : LeftMatrix<T>{part.second, taps * term.inner, term.inner, 1};
  const LeftRows<T> inner_channels = {b.data + begin * b.column, 1, b.column, 0};
  Prefetcher no_prefetch;
  gemm(inner_channels, end - begin, Depth::grid(part.end - part.begin, b.row, taps, b.tap),
       static_cast<const T*>(part.im2col), column_tiles<T>(width), total + begin * step, step, accumulate, no_prefetch);
}
