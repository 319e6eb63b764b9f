// Loads and stores between panels and tensors of any strides and element type.

// --- element types --------------------------------------------------------------------------------------------------

struct BFloat16 {
  std::uint16_t bits;

  operator float() const {
    const std::uint32_t wide = std::uint32_t{bits} << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
  }
  BFloat16() = default;
  explicit BFloat16(float value) {
    std::uint32_t wide;
    std::memcpy(&wide, &value, sizeof wide);
    const std::uint32_t rounded = wide + 0x7fffu + ((wide >> 16) & 1u);  // to nearest, ties to even
    const bool is_nan = (wide & 0x7fffffffu) > 0x7f800000u;
    bits = static_cast<std::uint16_t>(is_nan ? 0x7fc0u : rounded >> 16);
  }
};

#ifdef __FLT16_MANT_DIG__
using Float16 = _Float16;
#endif

// Call f with a pointer to the element type of `type`.
template <class F>
static void dispatch_type(Type type, F f) {
  switch (type) {
    case Type::float64:
      return f(static_cast<double*>(nullptr));
    case Type::float32:
      return f(static_cast<float*>(nullptr));
    case Type::bfloat16:
      return f(static_cast<BFloat16*>(nullptr));
#ifdef __FLT16_MANT_DIG__
    case Type::float16:
      return f(static_cast<Float16*>(nullptr));
#else
    case Type::float16:
      return;  // see `supports_type`
#endif
  }
}

// Double is rounded to a half type through float. Rounding twice differs from rounding once only near ties, and
// training does not combine float64 operands with half-precision kernels.
template <class S, class T>
static inline S narrow(T value) {
  if constexpr (sizeof(S) == 2)
    return static_cast<S>(static_cast<float>(value));
  else
    return static_cast<S>(value);
}

template <class T>
static inline T load_scalar(const View& view, std::int64_t row, std::int64_t column, T fallback) {
  if (view.data == nullptr) return fallback;
  if (view.type == type_of<T>) return static_cast<const T*>(view.data)[row * view.row + column * view.column];
  T value{};
  dispatch_type(view.type, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    value = static_cast<T>(static_cast<const S*>(view.data)[row * view.row + column * view.column]);
  });
  return value;
}

template <class T>
static inline void store_scalar(const View& view, std::int64_t row, std::int64_t column, T value) {
  if (view.type == type_of<T>) {
    static_cast<T*>(view.data)[row * view.row + column * view.column] = value;
    return;
  }
  dispatch_type(view.type, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    static_cast<S*>(view.data)[row * view.row + column * view.column] = narrow<S>(value);
  });
}

// --- vectors --------------------------------------------------------------------------------------------------------

// A vector fills one register. Longer vectors would be legal, but GCC keeps them in memory.
#ifdef __AVX512F__
constexpr std::int64_t vector_bytes = 64;
#elif defined(__AVX__)
constexpr std::int64_t vector_bytes = 32;
#else
constexpr std::int64_t vector_bytes = 16;
#endif

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(vector_bytes)));
};
template <class T>
using Vector = typename VectorOf<T>::type;

template <class T>
constexpr std::int64_t lanes = vector_bytes / sizeof(T);

template <class T>
static inline Vector<T> load_vector(const T* from) {
  Vector<T> value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

template <class T>
static inline void store_vector(T* to, Vector<T> value) {
  __builtin_memcpy(to, &value, sizeof value);
}

// --- transposition --------------------------------------------------------------------------------------------------

// Contiguous 3x3 kernels have their nine taps innermost. Nine-way (de)interleaving does not vectorise; three-way, done
// twice, does.
constexpr int interleave_block = 64;

template <class S, class T>
static void deinterleave_nine(const S* __restrict from, T* __restrict to, std::int64_t step, std::int64_t columns) {
  T part[3][3 * interleave_block];
  for (std::int64_t begin = 0; begin < columns; begin += interleave_block) {
    const int n = static_cast<int>(columns - begin < interleave_block ? columns - begin : interleave_block);
    const S* __restrict source = from + 9 * begin;
    for (int j = 0; j < 3 * n; ++j)
      for (int b = 0; b < 3; ++b) part[b][j] = static_cast<T>(source[3 * j + b]);
    for (int b = 0; b < 3; ++b) {
      T* __restrict rows[3] = {to + b * step + begin, to + (3 + b) * step + begin, to + (6 + b) * step + begin};
      for (int i = 0; i < n; ++i)
        for (int a = 0; a < 3; ++a) rows[a][i] = part[b][3 * i + a];
    }
  }
}

template <class S, class T>
static void interleave_nine(const T* __restrict from, std::int64_t step, S* __restrict to, std::int64_t columns) {
  T part[3][3 * interleave_block];
  for (std::int64_t begin = 0; begin < columns; begin += interleave_block) {
    const int n = static_cast<int>(columns - begin < interleave_block ? columns - begin : interleave_block);
    for (int b = 0; b < 3; ++b) {
      const T* rows[3] = {from + b * step + begin, from + (3 + b) * step + begin, from + (6 + b) * step + begin};
      for (int i = 0; i < n; ++i)
        for (int a = 0; a < 3; ++a) part[b][3 * i + a] = rows[a][i];
    }
    S* __restrict target = to + 9 * begin;
    for (int j = 0; j < 3 * n; ++j)
      for (int b = 0; b < 3; ++b) target[3 * j + b] = narrow<S>(part[b][j]);
  }
}

// to[tap * step + column] = view(row, column, tap)
template <class T>
static void load(const View& view, std::int64_t row, std::int64_t columns, std::int64_t taps, T* to,
                 std::int64_t step) {
  dispatch_type(view.type, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    const S* from = static_cast<const S*>(view.data) + row * view.row;
    if (taps == 9 && view.tap == 1 && view.column == 9) return deinterleave_nine(from, to, step, columns);
    for (std::int64_t t = 0; t < taps; ++t) {
      const S* __restrict source = from + t * view.tap;
      T* __restrict target = to + t * step;
      if (view.column == 1)
        for (std::int64_t i = 0; i < columns; ++i) target[i] = static_cast<T>(source[i]);
      else
        for (std::int64_t i = 0; i < columns; ++i) target[i] = static_cast<T>(source[i * view.column]);
    }
  });
}

// view(row, column, tap) = from[tap * step + column]
template <class T>
static void store(const T* from, std::int64_t step, std::int64_t columns, std::int64_t taps, const View& view,
                  std::int64_t row) {
  dispatch_type(view.type, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    S* to = static_cast<S*>(view.data) + row * view.row;
    if (taps == 9 && view.tap == 1 && view.column == 9) return interleave_nine(from, step, to, columns);
    for (std::int64_t t = 0; t < taps; ++t) {
      const T* __restrict source = from + t * step;
      S* __restrict target = to + t * view.tap;
      if (view.column == 1)
        for (std::int64_t i = 0; i < columns; ++i) target[i] = narrow<S>(source[i]);
      else
        for (std::int64_t i = 0; i < columns; ++i) target[i * view.column] = narrow<S>(source[i]);
    }
  });
}

// A panel, possibly in a tensor's own memory: element (tap, column) is data[tap * step + column].
template <class T>
struct Panel {
  T* data;
  std::int64_t step;

  T* operator[](std::int64_t tap) const { return data + tap * step; }
};

template <class T>
static bool has_panel_layout(const View& view, std::int64_t columns) {
  return view.type == type_of<T> && (view.column == 1 || columns == 1);
}

template <class T>
static Panel<T> panel_in_place(const View& view, std::int64_t row) {
  return {static_cast<T*>(view.data) + row * view.row, view.tap};
}

// Return a panel to read: the tensor's own memory where its layout allows, else a copy in `scratch`.
template <class T>
static Panel<const T> load_panel(const View& view, std::int64_t row, std::int64_t columns, std::int64_t taps,
                                 T* scratch) {
  if (has_panel_layout<T>(view, columns)) {
    const Panel<T> tensor = panel_in_place<T>(view, row);
    return {tensor.data, tensor.step};
  }
  load(view, row, columns, taps, scratch, columns);
  return {scratch, columns};
}

// Return whether rows of both views are gapless elements of T in the same order: elementwise loops need no panels then.
template <class T>
static bool same_dense_layout(const View& one, const View& other, std::int64_t columns, std::int64_t taps) {
  const bool taps_innermost = one.tap == 1 && one.column == taps,
             columns_innermost = one.column == 1 && one.tap == columns;
  return one.type == type_of<T> && other.type == type_of<T> && one.column == other.column && one.tap == other.tap &&
         (taps_innermost || columns_innermost);
}
