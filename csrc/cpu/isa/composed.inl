// Composed terms (paper Eq. 3) as matrix products. Included by rows.cpp only, inside its namespace.
//
// Per group, with c a tap of a and an input channel (`width_of` of them), and (o, q) an output channel and a tap of b:
//   the kernel     b [(o, q), inner] @ a [inner, c], whose rows then meet in the block's taps
//   gradient of b  flow [(o, q), c] @ a^T [c, inner], where flow is dW at the taps where q meets those of a
//   gradient of a  b^T [inner, (o, q)] @ flow [(o, q), c]
// What stands on the left is read as it lies, what stands on the right is packed.

template <class T>
static std::int64_t padded(std::int64_t width) {
  return right_tiles<T>(width) * tile_width<T>;
}

// Calls f(q, r, the block's tap) for each tap q of b and r of a, which meet in that tap.
template <class F>
static void each_meeting(const Block& block, const Term& term, F f) {
  const std::int64_t b_height = term.height - term.first_height + 1, b_width = term.width - term.first_width + 1;
  const Centred at(block, term);
  for (std::int64_t qh = 0; qh < b_height; ++qh)
    for (std::int64_t qw = 0; qw < b_width; ++qw)
      for (std::int64_t rh = 0; rh < term.first_height; ++rh)
        for (std::int64_t rw = 0; rw < term.first_width; ++rw)
          f(qh * b_width + qw, rh * term.first_width + rw, (at.top + qh + rh) * at.block_width + at.left + qw + rw);
}

// --- a, as a right matrix -------------------------------------------------------------------------------------------

template <class T>
static void pack_first(const Block& block, const Term& term, std::int64_t group, bool transposed, T* out,
                       std::int64_t begin, std::int64_t end) {
  constexpr std::int64_t n = tile_width<T>;
  const std::int64_t columns = block.in_per_group, a_taps = taps_of_a(term), inner = term.inner;
  with_type(term.a.type, [&](auto* type) {
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
        const std::int64_t place = m % columns - tile * n;
        if (place >= 0 && place < n) to[place] += 1;
      }
  });
}

template <class T>
static void unpack_first(const Block& block, const Term& term, std::int64_t group, const T* total, std::int64_t begin,
                         std::int64_t end) {
  const std::int64_t columns = block.in_per_group, step = padded<T>(width_of(block, term));
  for (std::int64_t m = begin; m < end; ++m)
    store(total + m * step, columns, columns, taps_of_a(term), term.grad_a, group * term.inner + m);
}

// --- b and dW, as left matrices -------------------------------------------------------------------------------------

// Element (o, q, c) at data + o * row + q * tap + c * column, o counted from the first that is meant.
template <class T>
struct Left {
  const T* data;
  std::int64_t row, tap, column;

  Rows<T> rows(std::int64_t taps) const { return {data, taps, row, tap}; }
};

template <class T>
static Left<T> as_it_lies(const View& view, std::int64_t first) {
  return {static_cast<const T*>(view.data) + first * view.row, view.row, view.tap, view.column};
}

// A row for each output channel of [begin, end), in T: the tensor itself, or copied to `copy`.
template <class T>
static Left<T> in_precision(const View& view, std::int64_t begin, std::int64_t end, std::int64_t columns,
                            std::int64_t taps, T* copy) {
  if (view.type == type_of<T>) return as_it_lies<T>(view, begin);
  for (std::int64_t o = begin; o < end; ++o) load(view, o, columns, taps, copy + (o - begin) * taps * columns, columns);
  return {copy, taps * columns, columns, 1};
}

// The flow of output channels [begin, end), given dW as panels: dW itself, or copied to `copy`.
template <class T>
static Left<T> flow_of(const Block& block, const Term& term, const Panel<const T>* g, std::int64_t begin,
                       std::int64_t end, T* copy) {
  const std::int64_t columns = block.in_per_group, a_taps = taps_of_a(term), row = taps_of_b(term) * a_taps * columns;
  if (block.kernel.type == type_of<T> && a_taps == 1 && term.height == block.height && term.width == block.width)
    return as_it_lies<T>(block.kernel, begin);
  for (std::int64_t o = begin; o < end; ++o)
    each_meeting(block, term, [&](std::int64_t q, std::int64_t r, std::int64_t p) {
      T* const to = copy + (o - begin) * row + (q * a_taps + r) * columns;
      std::memcpy(to, g[o - begin][p], columns * sizeof(T));
    });
  return {copy, row, a_taps * columns, 1};
}

// --- what to ask for ahead of time -----------------------------------------------------------------------------------

// Rows of all terms that are composed, or of all others.
static void add_rows(const Block& block, bool composed, std::int64_t begin, std::int64_t end, Ahead& ahead) {
  for (std::int32_t index = 0; index < block.terms; ++index) {
    const Term& term = block.term[index];
    if ((term.kind == Kind::composed) != composed) continue;
    const OutputRows rows = output_rows(block, term);
    ahead.add(rows.factor, begin, end, rows.elements);
    ahead.add(rows.gradient, begin, end, rows.elements);
  }
}

// The output channels after the last that is worked on now.
static std::int64_t next_rows(const Block& block, std::int64_t end) {
  return end + rows_at_once < block.out_channels ? end + rows_at_once : block.out_channels;
}

// --- products -------------------------------------------------------------------------------------------------------

// out [(o, q)][c, padded] for output channels [begin, end) of one group.
template <class T>
static void compose(const Block& block, const Term& term, const T* first, T* scratch, T* out, std::int64_t begin,
                    std::int64_t end, Ahead& ahead) {
  const std::int64_t width = width_of(block, term), taps = taps_of_b(term), inner = term.inner;
  const Left<T> b = in_precision(term.b, begin, end, inner, taps, scratch);
  const T* const own_first = first + begin / block.out_per_group() * inner * padded<T>(width);
  multiply(b.rows(taps), (end - begin) * taps, Depth::line(inner, b.column), own_first, right_tiles<T>(width), out,
           padded<T>(width), false, ahead);
}

// The gradient of b and of the scale, one output channel, from u = flow a^T, [q][inner, padded].
template <class T>
static void second_backward(const Block& block, const Term& term, const T* u, std::int64_t o, T* scratch) {
  const std::int64_t inner = term.inner, taps = taps_of_b(term), step = padded<T>(inner);
  const T scale = scale_of<T>(block, term, o);
  if (term.grad_b.data != nullptr && same_runs<T>(term.b, term.grad_b, inner, taps)) {
    store(u, step, inner, taps, term.grad_b, o);
    T* const out = in_place<T>(term.grad_b, o).data;
    put_scale(block, term, o,
              scale_and_dot(out, static_cast<const T*>(in_place<T>(term.b, o).data), scale, taps * inner));
    return;
  }
  const Panel<const T> b = panel<T>(term.b, o, inner, taps, scratch);
  const bool direct = term.grad_b.data != nullptr && is_panel<T>(term.grad_b, inner);
  const Panel<T> out = direct ? in_place<T>(term.grad_b, o) : Panel<T>{scratch + taps * inner, inner};
  T sum = 0;
  for (std::int64_t q = 0; q < taps; ++q) sum += set_and_dot(out[q], u + q * step, b[q], scale, inner);
  put_scale(block, term, o, sum);
  if (term.grad_b.data != nullptr && !direct)
    store(static_cast<const T*>(out.data), inner, inner, taps, term.grad_b, o);
}

// The flow of one output channel times its scale, as rows (o, q) of a right matrix [(o, q), c]. `place`: the first of
// those rows, of `depth` that the matrix has.
template <class T>
static void pack_flow(const Block& block, const Term& term, const Panel<const T>& g, T scale, std::int64_t place,
                      std::int64_t depth, T* out) {
  constexpr std::int64_t n = tile_width<T>;
  const std::int64_t columns = block.in_per_group, width = width_of(block, term);
  each_meeting(block, term, [&](std::int64_t q, std::int64_t r, std::int64_t p) {
    T* const row = out + (place + q) * n;  // of the first tile; the next is `depth` rows further
    const T* __restrict from = g[p];
    for (std::int64_t i = 0, c = r * columns; i < columns;) {
      const std::int64_t lane = c % n, some = n - lane < columns - i ? n - lane : columns - i;
      T* __restrict to = row + c / n * depth * n + lane;
      if (some == n) {
#pragma GCC unroll 2
        for (int v = 0; v < tile_vectors; ++v)
          store_vector(to + v * lanes<T>, load_vector(from + i + v * lanes<T>) * scale);
      } else {
        for (std::int64_t j = 0; j < some; ++j) to[j] = scale * from[i + j];
      }
      i += some;
      c += some;
    }
  });
  if (width % n == 0) return;
  T* const last = out + width / n * depth * n + place * n;
  for (std::int64_t q = 0; q < taps_of_b(term); ++q)
    for (std::int64_t lane = width % n; lane < n; ++lane) last[q * n + lane] = 0;
}

// The part that a piece has of one group: output channels, and where they are in the piece's memory.
template <class T>
struct Part {
  std::int64_t begin, end;
  T *flow, *second;

  Part(const Block& block, const Piece<T>& piece, std::int32_t index, std::int64_t group) {
    const std::int64_t rows = block.out_per_group();
    begin = group * rows > piece.begin ? group * rows : piece.begin;
    end = (group + 1) * rows < piece.end ? (group + 1) * rows : piece.end;
    const Term& term = block.term[index];
    const std::int64_t before = (begin - piece.begin) * taps_of_b(term);
    flow = piece.flow[index] + before * padded<T>(width_of(block, term));
    second = piece.second[index] == nullptr ? nullptr : piece.second[index] + before * term.inner;
  }
};

// What output channels [begin, end) of one group (`rows_at_once` of them at most) contribute, given dW as panels.
template <class T>
static void composed_backward(const Block& block, std::int32_t index, const T* first, const Piece<T>& piece,
                              const Panel<const T>* g, T* scratch, std::int64_t begin, std::int64_t end, Ahead& ahead) {
  const Term& term = block.term[index];
  const std::int64_t width = width_of(block, term), taps = taps_of_b(term), inner = term.inner;
  const std::int64_t group = begin / block.out_per_group();
  if (term.grad_b.data != nullptr || (term.scale >= 0 && block.grad_scales.data != nullptr)) {
    const std::int64_t step = padded<T>(inner);
    T* const spare = scratch + rows_at_once * taps * step;
    const Left<T> flow = flow_of(block, term, g, begin, end, spare);
    multiply(flow.rows(taps), (end - begin) * taps, Depth::line(width, flow.column), first + group * width * step,
             right_tiles<T>(inner), scratch, step, false, ahead);
    for (std::int64_t o = begin; o < end; ++o)
      second_backward(block, term, scratch + (o - begin) * taps * step, o, spare);
  }
  if (piece.flow[index] == nullptr) return;
  const Part<T> part(block, piece, index, group);
  const std::int64_t depth = (part.end - part.begin) * taps;
  for (std::int64_t o = begin; o < end; ++o)
    pack_flow(block, term, g[o - begin], scale_of<T>(block, term, o), (o - part.begin) * taps, depth, part.flow);
  if (part.second != nullptr)
    in_precision(term.b, begin, end, inner, taps, part.second + (begin - part.begin) * taps * inner);
}

template <class T>
static void add_to_first(const Block& block, const Piece<T>& piece, std::int32_t index, std::int64_t group, T* total,
                         bool add, std::int64_t begin, std::int64_t end) {
  const Term& term = block.term[index];
  const Part<T> part(block, piece, index, group);
  const std::int64_t width = width_of(block, term), step = padded<T>(width), taps = taps_of_b(term);
  const Left<T> b = part.second == nullptr ? as_it_lies<T>(term.b, part.begin)
                                           : Left<T>{part.second, taps * term.inner, term.inner, 1};
  const Rows<T> channels = {b.data + begin * b.column, 1, b.column, 0};
  Ahead nothing;
  multiply(channels, end - begin, Depth::grid(part.end - part.begin, b.row, taps, b.tap),
           static_cast<const T*>(part.flow), right_tiles<T>(width), total + begin * step, step, add, nothing);
}
