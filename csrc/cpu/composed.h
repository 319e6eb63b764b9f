// Composed terms (paper Eq. 3) as matrix products. Included by rows.cpp only, inside its namespace.
//
// Per group, with c a tap of a and an input channel, and (o, q) an output channel and a tap of b:
//   the kernel     [(o, q), inner] @ a [inner, c], whose rows then meet in the block's taps
//   gradient of b  flow [(o, q), c] @ a^T [c, inner], where flow is dW at the taps where q meets those of a
//   gradient of a  flow^T [c, (o, q)] @ b [(o, q), inner], transposed
// What stands on the left is read as it lies, what stands on the right is packed.

static std::int64_t taps_of_a(const Term& term) {
  return std::int64_t{term.first_height} * term.first_width;
}

static std::int64_t taps_of_b(const Term& term) {
  return std::int64_t{term.height - term.first_height + 1} * (term.width - term.first_width + 1);
}

// How many c there are.
static std::int64_t width_of(const Block& block, const Term& term) {
  return taps_of_a(term) * block.in_per_group;
}

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
        for (std::int64_t lane = 0; lane < n; ++lane) {
          to[lane] = r < a_taps ? static_cast<T>(from[m * a.row + i * a.column + r * a.tap]) : T{0};
          if (term.identity && r == 0 && i == m % columns) to[lane] += 1;
          if (++i == columns) i = 0, ++r;
        }
      }
  });
}

template <class T>
static void unpack_first(const Block& block, const Term& term, std::int64_t group, const T* total, std::int64_t begin,
                         std::int64_t end) {
  const std::int64_t columns = block.in_per_group, step = padded<T>(term.inner);
  const View& a = term.grad_a;
  with_type(a.type, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    for (std::int64_t m = begin; m < end; ++m) {
      S* const to = static_cast<S*>(a.data) + (group * term.inner + m) * a.row;
      const T* from = total + m;
      for (std::int64_t r = 0; r < taps_of_a(term); ++r)
        for (std::int64_t i = 0; i < columns; ++i, from += step) to[i * a.column + r * a.tap] = narrow<S>(*from);
    }
  });
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

// b for output channels [begin, end), in T: itself, or copied to `scratch`.
template <class T>
static Left<T> second_for_products(const Term& term, std::int64_t begin, std::int64_t end, T* scratch) {
  if (term.b.type == type_of<T>) return as_it_lies<T>(term.b, begin);
  const std::int64_t inner = term.inner, taps = taps_of_b(term);
  for (std::int64_t o = begin; o < end; ++o)
    load(term.b, o, inner, taps, scratch + (o - begin) * taps * inner, inner);
  return {scratch, taps * inner, inner, 1};
}

// The flow from output channel `first` on.
template <class T>
static Left<T> flow_from(const Block& block, const Piece<T>& piece, std::int32_t index, std::int64_t first) {
  if (piece.flow[index] == nullptr) return as_it_lies<T>(block.kernel, first);
  const Term& term = block.term[index];
  const std::int64_t width = width_of(block, term), row = taps_of_b(term) * width;
  return {piece.flow[index] + (first - piece.begin) * row, row, width, 1};
}

// --- products -------------------------------------------------------------------------------------------------------

// out [(o, q)][c, padded] for output channels [begin, end) of one group.
template <class T>
static void compose(const Block& block, const Term& term, const T* first, T* scratch, T* out, std::int64_t begin,
                    std::int64_t end) {
  const std::int64_t width = width_of(block, term), taps = taps_of_b(term), inner = term.inner;
  const Left<T> b = second_for_products(term, begin, end, scratch);
  const T* const own_first = first + begin / block.out_per_group() * inner * padded<T>(width);
  multiply(b.rows(taps), (end - begin) * taps, {1, 0, inner, b.column}, own_first, right_tiles<T>(width), out,
           padded<T>(width), false);
}

// dW at the taps of the flow, one output channel.
template <class T>
static void gather(const Block& block, const Term& term, const Panel<const T>& g, T* out) {
  const std::int64_t columns = block.in_per_group, a_taps = taps_of_a(term);
  each_meeting(block, term, [&](std::int64_t q, std::int64_t r, std::int64_t p) {
    std::memcpy(out + (q * a_taps + r) * columns, g[p], columns * sizeof(T));
  });
}

// The gradient of b and of the scale, one output channel, from u = flow a^T, [q][inner, padded].
template <class T>
static void second_backward(const Block& block, const Term& term, const T* u, std::int64_t o, T* scratch) {
  const std::int64_t inner = term.inner, taps = taps_of_b(term), step = padded<T>(inner);
  const T scale = scale_of<T>(block, term, o);
  if (term.grad_b.data != nullptr && same_runs<T>(term.b, term.grad_b, inner, taps)) {
    store(u, step, inner, taps, term.grad_b, o);
    T* const out = in_place<T>(term.grad_b, o).data;
    put_scale(block, term, o, scale_and_dot(out, static_cast<const T*>(in_place<T>(term.b, o).data), scale, taps * inner));
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

// Output channel o of b, times its scale, as (o, q) of a right matrix [(o, q), inner]. `depth`: how many (o, q) its group
// has in this piece; `out`: where the first of them is.
template <class T>
static void pack_second(const Block& block, const Term& term, std::int64_t o, std::int64_t place, std::int64_t depth,
                        T* out, T* scratch) {
  constexpr std::int64_t n = tile_width<T>;
  const std::int64_t inner = term.inner, taps = taps_of_b(term);
  const Panel<const T> b = panel<T>(term.b, o, inner, taps, scratch);
  const T scale = scale_of<T>(block, term, o);
  for (std::int64_t begin = 0; begin < inner; begin += n, out += depth * n)
    for (std::int64_t q = 0; q < taps; ++q) {
      T* __restrict to = out + (place + q) * n;
      const T* __restrict from = b[q] + begin;
      if (inner - begin >= n)
        for (std::int64_t lane = 0; lane < n; ++lane) to[lane] = scale * from[lane];
      else
        for (std::int64_t lane = 0; lane < n; ++lane) to[lane] = lane < inner - begin ? scale * from[lane] : T{0};
    }
}

// The part that a piece has of the group of output channel o: its channels, and where they are in `piece.second`.
template <class T>
struct Part {
  std::int64_t begin, end;
  T* second;

  Part(const Block& block, const Piece<T>& piece, std::int32_t index, std::int64_t group) {
    const std::int64_t rows = block.out_per_group();
    begin = group * rows > piece.begin ? group * rows : piece.begin;
    end = (group + 1) * rows < piece.end ? (group + 1) * rows : piece.end;
    const Term& term = block.term[index];
    second = piece.second[index] + (begin - piece.begin) * taps_of_b(term) * padded<T>(term.inner);
  }
};

// What output channels [begin, end) of one group (`rows_at_once` of them at most) contribute, given dW as panels.
template <class T>
static void composed_backward(const Block& block, std::int32_t index, const T* first, const Piece<T>& piece,
                              const Panel<const T>* g, T* scratch, std::int64_t begin, std::int64_t end) {
  const Term& term = block.term[index];
  const std::int64_t width = width_of(block, term), taps = taps_of_b(term), step = padded<T>(term.inner);
  const std::int64_t group = begin / block.out_per_group();
  if (piece.flow[index] != nullptr)
    for (std::int64_t o = begin; o < end; ++o)
      gather(block, term, g[o - begin], piece.flow[index] + (o - piece.begin) * taps * width);
  if (term.grad_b.data != nullptr || (term.scale >= 0 && block.grad_scales.data != nullptr)) {
    const Left<T> flow = flow_from(block, piece, index, begin);
    T* const spare = scratch + rows_at_once * taps * step;
    multiply(flow.rows(taps), (end - begin) * taps, {1, 0, width, flow.column}, first + group * width * step,
             right_tiles<T>(term.inner), scratch, step, false);
    for (std::int64_t o = begin; o < end; ++o)
      second_backward(block, term, scratch + (o - begin) * taps * step, o, spare);
  }
  if (piece.second[index] != nullptr) {
    const Part<T> part(block, piece, index, group);
    const std::int64_t depth = (part.end - part.begin) * taps;
    for (std::int64_t o = begin; o < end; ++o)
      pack_second(block, term, o, (o - part.begin) * taps, depth, part.second, scratch);
  }
}

template <class T>
static void add_to_first(const Block& block, const Piece<T>& piece, std::int32_t index, std::int64_t group, T* total,
                         bool add, std::int64_t begin, std::int64_t end) {
  const Term& term = block.term[index];
  const Part<T> part(block, piece, index, group);
  const Left<T> flow = flow_from(block, piece, index, part.begin);
  const std::int64_t step = padded<T>(term.inner);
  const Rows<T> channels = {flow.data + begin * flow.column, 1, flow.column, 0};
  multiply(channels, end - begin, {part.end - part.begin, flow.row, taps_of_b(term), flow.tap},
           static_cast<const T*>(part.second), right_tiles<T>(term.inner), total + begin * step, step, add);
}
