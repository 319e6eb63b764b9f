// The arithmetic of the squeeze on a CPU, row by row. CMake compiles this file once per instruction set, each time with
// its own OREPA_ISA: attributes such as target_clones reach neither templates nor the bodies of OpenMP regions. Nothing
// here may come from a header with inline functions: the linker would keep one copy, of whichever instruction set.

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels.h"

namespace orepa::cpu::OREPA_ISA {

#include "layout.h"

// --- vectors --------------------------------------------------------------------------------------------------------

// y += factor * x
template <class T>
static void add(T* __restrict y, const T* __restrict x, T factor, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) y[i] += factor * x[i];
}

// y = factor * x
template <class T>
static void set(T* __restrict y, const T* __restrict x, T factor, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) y[i] = factor * x[i];
}

template <class T>
static T dot(const T* __restrict x, const T* __restrict y, std::int64_t n) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t i = 0; i < n; ++i) sum += x[i] * y[i];
  return sum;
}

// --- geometry -------------------------------------------------------------------------------------------------------

// Where the taps of a smaller, centred kernel lie in the block's.
struct Centred {
  std::int64_t top, left, width, block_width;

  Centred(const Block& block, std::int64_t height, std::int64_t width)
      : top((block.height - height) / 2), left((block.width - width) / 2), width(width), block_width(block.width) {}

  std::int64_t operator()(std::int64_t tap) const { return (tap / width + top) * block_width + tap % width + left; }
};

// The tap of a composed kernel that tap q of b and tap r of a meet in (paper Eq. 3).
static std::int64_t meeting_tap(const Term& term, const Centred& centred, std::int64_t q, std::int64_t r) {
  const std::int64_t second_width = term.width - term.first_width + 1;
  const std::int64_t h = q / second_width + r / term.first_width, w = q % second_width + r % term.first_width;
  return centred(h * term.width + w);
}

static std::int64_t taps_of_a(const Term& term) {
  return std::int64_t{term.first_height} * term.first_width;
}

static std::int64_t taps_of_b(const Term& term) {
  return std::int64_t{term.height - term.first_height + 1} * (term.width - term.first_width + 1);
}

template <class T>
static T scale_of(const Block& block, const Term& term, std::int64_t o) {
  return term.scale < 0 ? T{1} : scalar<T>(block.scales, term.scale, o, 1);
}

// The filter's value at one tap; without a filter, the average's.
template <class T>
static T filter_at(const Term& term, std::int64_t o, std::int64_t tap) {
  if (term.b.data == nullptr) return T{1} / static_cast<T>(term.height * term.width);
  const View taps_as_columns = {term.b.data, term.b.row, term.b.tap, 0, term.b.type};
  return scalar<T>(taps_as_columns, o, tap, 0);
}

template <class T>
static void put_scale(const Block& block, const Term& term, std::int64_t o, T gradient) {
  if (term.scale >= 0 && block.grad_scales.data != nullptr) set_scalar(block.grad_scales, term.scale, o, gradient);
}

#include "separable.h"

// --- forward --------------------------------------------------------------------------------------------------------

// Whether a dense term lies in memory as the block's kernel does: it is added after that is stored, untransposed.
template <class T>
static bool is_added_last(const Block& block, const Term& term) {
  return term.height == block.height && term.width == block.width &&
         same_runs<T>(block.kernel, term.a, block.in_per_group, block.taps());
}

template <class T>
static void pack(const View& view, const View& factor, std::int64_t columns, std::int64_t taps, T* out,
                 std::int64_t begin, std::int64_t end) {
  for (std::int64_t row = begin; row < end; ++row) {
    T* to = out + row * taps * columns;
    load(view, row, columns, taps, to, columns);
    const T by = scalar<T>(factor, row, 0, 1);
    if (by != 1)
      for (std::int64_t i = 0; i < taps * columns; ++i) to[i] *= by;
  }
}

template <class T>
static void unpack(const T* panels, std::int64_t columns, std::int64_t taps, const View& view, std::int64_t begin,
                   std::int64_t end) {
  for (std::int64_t row = begin; row < end; ++row)
    store(panels + row * taps * columns, columns, columns, taps, view, row);
}

// The row of one output channel without its separable terms.
template <class T>
static void forward_row(const Block& block, Panel<T> w, bool direct, const T* const* products, T fold, T* spare,
                        std::int64_t o) {
  const std::int64_t columns = block.in_per_group, taps = block.taps();
  for (std::int64_t t = 0; t < taps; ++t) std::memset(w[t], 0, columns * sizeof(T));
  for (std::int32_t index = 0; index < block.terms; ++index) {
    const Term& term = block.term[index];
    const Centred at(block, term.height, term.width);
    const std::int64_t own_taps = std::int64_t{term.height} * term.width;
    const T scale = fold * scale_of<T>(block, term, o);
    switch (term.kind) {
      case Kind::dense: {
        if (!direct && is_added_last<T>(block, term)) break;
        const Panel<const T> a = panel<T>(term.a, o, columns, own_taps, spare);
        for (std::int64_t t = 0; t < own_taps; ++t) add(w[at(t)], a[t], scale, columns);
        break;
      }
      case Kind::pointwise: {
        if (term.a.data == nullptr) {
          for (std::int64_t t = 0; t < own_taps; ++t) w[at(t)][o % columns] += scale * filter_at<T>(term, o, t);
          break;
        }
        const Panel<const T> a = panel<T>(term.a, o, columns, 1, spare);
        for (std::int64_t t = 0; t < own_taps; ++t) add(w[at(t)], a[0], scale * filter_at<T>(term, o, t), columns);
        break;
      }
      case Kind::composed: {
        const std::int64_t a_taps = taps_of_a(term), b_taps = taps_of_b(term);
        const T* product = products[index] + o * b_taps * a_taps * columns;
        for (std::int64_t q = 0; q < b_taps; ++q)
          for (std::int64_t r = 0; r < a_taps; ++r)
            add(w[meeting_tap(term, at, q, r)], product + (q * a_taps + r) * columns, scale, columns);
        if (!term.identity) break;
        const Panel<const T> b = panel<T>(term.b, o, term.inner, b_taps, spare);  // exact: b itself, added
        for (std::int64_t q = 0; q < b_taps; ++q)
          for (std::int64_t m = 0; m < term.inner; m += columns) add(w[at(q)], b[q] + m, scale, columns);
        break;
      }
      case Kind::separable: {
        if (term.b.data != nullptr) break;
        const View values = {term.a.data, term.a.row, term.a.tap, 0, term.a.type};  // taps as columns
        for (std::int64_t t = 0; t < own_taps; ++t)
          w[at(t)][o / term.inner % columns] += scale * scalar<T>(values, o, t, 0);
        break;
      }
    }
  }
}

// Output channels [begin, end) of one group, `separable_rows` of them at most.
template <class T>
static void forward_rows(const Block& block, const T* const* products, const T* const* depthwise, T* scratch,
                         std::int64_t begin, std::int64_t end) {
  const std::int64_t columns = block.in_per_group, taps = block.taps(), group = begin / block.out_per_group();
  const bool direct = is_panel<T>(block.kernel, columns);
  T* const spare = scratch + (direct ? 0 : separable_rows * taps * columns);
  Panel<T> w[separable_rows];
  T folds[separable_rows];
  for (std::int64_t o = begin; o < end; ++o) {
    w[o - begin] = direct ? in_place<T>(block.kernel, o) : Panel<T>{scratch + (o - begin) * taps * columns, columns};
    folds[o - begin] = scalar<T>(block.fold, o, 0, 1);
    forward_row(block, w[o - begin], direct, products, folds[o - begin], spare, o);
  }
  for (std::int32_t index = 0; index < block.terms; ++index) {
    const Term& term = block.term[index];
    if (term.kind != Kind::separable || term.b.data == nullptr) continue;
    const Centred at(block, term.height, term.width);
    const std::int64_t own_taps = std::int64_t{term.height} * term.width, count = tiles<T>(columns);
    const std::int64_t row = count * lanes<T> * term.inner;
    const T* const dw = depthwise[index] + group * row * own_taps;
    for (std::int64_t o = begin; o < end; ++o) load_expanded(term.b, o, columns, term.inner, spare + (o - begin) * row);
    for (std::int64_t tile = 0; tile < count; ++tile)
      for (std::int64_t o = begin; o < end; ++o) {
        const T* const p = spare + (o - begin) * row + tile * lanes<T> * term.inner;
        const T* const d = dw + tile * lanes<T> * term.inner * own_taps;
        const T factor = folds[o - begin] * scale_of<T>(block, term, o);
        std::int64_t e = 0;
        for (; e + 8 <= term.inner; e += 8)
          add_separable<T, 8>(w[o - begin], at, own_taps, p + e * lanes<T>, d + e * lanes<T>, term.inner, factor,
                              tile * lanes<T>, columns);
        for (; e < term.inner; ++e)
          add_separable<T, 1>(w[o - begin], at, own_taps, p + e * lanes<T>, d + e * lanes<T>, term.inner, factor,
                              tile * lanes<T>, columns);
      }
  }
  if (direct) return;
  for (std::int64_t o = begin; o < end; ++o) {
    store(static_cast<const T*>(w[o - begin].data), columns, columns, taps, block.kernel, o);
    for (std::int32_t index = 0; index < block.terms; ++index) {
      const Term& term = block.term[index];
      if (term.kind == Kind::dense && is_added_last<T>(block, term))
        add(in_place<T>(block.kernel, o).data, static_cast<const T*>(in_place<T>(term.a, o).data),
            folds[o - begin] * scale_of<T>(block, term, o), taps * columns);
    }
  }
}

template <class T>
static void forward(const Block& block, const T* const* products, const T* const* depthwise, T* scratch,
                    std::int64_t begin, std::int64_t end) {
  for (std::int64_t first = begin; first < end;) {
    const std::int64_t group_end = (first / block.out_per_group() + 1) * block.out_per_group();
    std::int64_t last = first + separable_rows < group_end ? first + separable_rows : group_end;
    if (last > end) last = end;
    forward_rows(block, products, depthwise, scratch, first, last);
    first = last;
  }
}

// --- backward -------------------------------------------------------------------------------------------------------

// grad = scale * g and the scale's gradient <g, x>, both in the layout that all of them share.
template <class T>
static T dense_as_they_lie(const View& upstream, const View& x, const View& grad, std::int64_t o, T scale,
                           std::int64_t n) {
  const T* g = in_place<T>(upstream, o).data;
  if (grad.data != nullptr) set(in_place<T>(grad, o).data, g, scale, n);
  return dot(g, static_cast<const T*>(in_place<T>(x, o).data), n);
}

template <class T>
static T dense_backward(const Block& block, const Term& term, Panel<const T> g, std::int64_t o, T scale, T* spare) {
  const std::int64_t columns = block.in_per_group, taps = block.taps();
  const std::int64_t own_taps = std::int64_t{term.height} * term.width;
  const View& grad = term.grad_a.data != nullptr ? term.grad_a : term.a;
  if (own_taps == taps && same_runs<T>(block.kernel, term.a, columns, taps) &&
      same_runs<T>(block.kernel, grad, columns, taps))
    return dense_as_they_lie<T>(block.kernel, term.a, term.grad_a, o, scale, taps * columns);
  const Centred at(block, term.height, term.width);
  T sum = 0;
  const Panel<const T> a = panel<T>(term.a, o, columns, own_taps, spare);
  for (std::int64_t t = 0; t < own_taps; ++t) sum += dot(g[at(t)], a[t], columns);
  if (term.grad_a.data == nullptr) return sum;
  const bool direct = is_panel<T>(term.grad_a, columns);
  const Panel<T> out = direct ? in_place<T>(term.grad_a, o) : Panel<T>{spare, columns};
  for (std::int64_t t = 0; t < own_taps; ++t) set(out[t], g[at(t)], scale, columns);
  if (!direct) store(spare, columns, columns, own_taps, term.grad_a, o);
  return sum;
}

template <class T>
static T pointwise_backward(const Block& block, const Term& term, Panel<const T> g, std::int64_t o, T scale, T* filters,
                            T* spare) {
  const std::int64_t columns = block.in_per_group, own_taps = std::int64_t{term.height} * term.width;
  const Centred at(block, term.height, term.width);
  if (term.a.data == nullptr) {
    T sum = 0;
    for (std::int64_t t = 0; t < own_taps; ++t) {
      const T value = g[at(t)][o % columns];
      if (filters != nullptr) filters[o * own_taps + t] = scale * value;
      sum += filter_at<T>(term, o, t) * value;
    }
    return sum;
  }
  T *const filtered = spare, *const copy = spare + columns;
  const Panel<const T> a = panel<T>(term.a, o, columns, 1, copy);
  std::memset(filtered, 0, columns * sizeof(T));
  for (std::int64_t t = 0; t < own_taps; ++t) {
    add(filtered, g[at(t)], filter_at<T>(term, o, t), columns);
    if (filters != nullptr) filters[o * own_taps + t] = scale * dot(g[at(t)], a[0], columns);
  }
  const T sum = dot(filtered, a[0], columns);
  if (term.grad_a.data != nullptr) {
    set(copy, static_cast<const T*>(filtered), scale, columns);  // `a` is read no more
    store(copy, columns, columns, 1, term.grad_a, o);
  }
  return sum;
}

// A depthwise convolution alone: one input channel per output channel.
template <class T>
static T depthwise_backward(const Block& block, const Term& term, Panel<const T> g, std::int64_t o, T scale) {
  const Centred at(block, term.height, term.width);
  const View values = {term.a.data, term.a.row, term.a.tap, 0, term.a.type};  // taps as columns
  const View gradient = {term.grad_a.data, term.grad_a.row, term.grad_a.tap, 0, term.grad_a.type};
  T sum = 0;
  for (std::int64_t t = 0; t < std::int64_t{term.height} * term.width; ++t) {
    const T value = g[at(t)][o / term.inner % block.in_per_group];
    sum += value * scalar<T>(values, o, t, 0);
    if (gradient.data != nullptr) set_scalar(gradient, o, t, scale * value);
  }
  return sum;
}

// Output channels [begin, end), `separable_rows` of them at most: one input tile is worked on for all of them.
template <class T>
static void separable_backward(const Block& block, const Term& term, const T* panels, const T* depthwise,
                               T* grad_depthwise, T* scratch, std::int64_t begin, std::int64_t end) {
  constexpr std::int64_t n = lanes<T>;
  const std::int64_t columns = block.in_per_group, expand = term.inner, count = tiles<T>(columns), rows = end - begin;
  const std::int64_t taps = std::int64_t{term.height} * term.width, group = begin / block.out_per_group();
  const Centred at(block, term.height, term.width);
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
      for (std::int64_t t = 0; t < taps; ++t) {
        const T* from = panels + ((begin + row) * block.taps() + at(t)) * columns + tile * n;
        if (width < n) store_vector(own + t * n, Vector<T>{});
        if (width == n)
          store_vector(own + t * n, load_vector(from));
        else
          for (std::int64_t lane = 0; lane < width; ++lane) own[t * n + lane] = from[lane];
      }
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
  const Centred at(block, term.height, term.width);
  const bool as_they_lie = term.grad_b.data != nullptr && same_runs<T>(term.b, term.grad_b, inner, b_taps);
  T *const sum_panel = scratch, *const spare = scratch + b_taps * inner;
  for (std::int64_t o = begin; o < end; ++o) {
    const T* u = product + o * b_taps * inner;
    if (term.identity) {
      for (std::int64_t q = 0; q < b_taps; ++q)
        for (std::int64_t m = 0; m < inner; m += columns) {
          const T* g = panels + (o * block.taps() + at(q)) * columns;
          T* __restrict out = sum_panel + q * inner + m;
          const T* __restrict from = u + q * inner + m;
          for (std::int64_t i = 0; i < columns; ++i) out[i] = from[i] + g[i];
        }
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
    T sum = 0;
    for (std::int64_t q = 0; q < b_taps; ++q) sum += dot(u + q * inner, b[q], inner);
    put_scale(block, term, o, sum);
    if (term.grad_b.data != nullptr) {
      set(spare, u, scale, b_taps * inner);  // `b` is read no more
      store(static_cast<const T*>(spare), inner, inner, b_taps, term.grad_b, o);
    }
  }
}

template <class T>
static void gather(const Block& block, const Term& term, const T* panels, T* out, std::int64_t begin,
                   std::int64_t end) {
  const std::int64_t columns = block.in_per_group, a_taps = taps_of_a(term), b_taps = taps_of_b(term);
  const Centred at(block, term.height, term.width);
  for (std::int64_t o = begin; o < end; ++o)
    for (std::int64_t q = 0; q < b_taps; ++q)
      for (std::int64_t r = 0; r < a_taps; ++r)
        std::memcpy(out + ((o * b_taps + q) * a_taps + r) * columns,
                    panels + (o * block.taps() + meeting_tap(term, at, q, r)) * columns, columns * sizeof(T));
}

extern const Kernels<float> float_kernels;
const Kernels<float> float_kernels = {
    pack<float>,    unpack<float>,   pack_depthwise<float>,    unpack_depthwise<float>,
    forward<float>, backward<float>, composed_backward<float>, gather<float>,
};

extern const Kernels<double> double_kernels;
const Kernels<double> double_kernels = {
    pack<double>,    unpack<double>,   pack_depthwise<double>,    unpack_depthwise<double>,
    forward<double>, backward<double>, composed_backward<double>, gather<double>,
};

}  // namespace orepa::cpu::OREPA_ISA
