// Sums over channels and over terms. Included by rows.cpp only, inside its namespace.

template <class T>
static T dot(const T* __restrict x, const T* __restrict y, std::int64_t n) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t i = 0; i < n; ++i) sum += x[i] * y[i];
  return sum;
}

// y = factor * x, and <x, z>
template <class T>
static T set_and_dot(T* __restrict y, const T* __restrict x, const T* __restrict z, T factor, std::int64_t n) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t i = 0; i < n; ++i) {
    sum += x[i] * z[i];
    y[i] = factor * x[i];
  }
  return sum;
}

// y = factor * y, and <y, z> before
template <class T>
static T scale_and_dot(T* __restrict y, const T* __restrict z, T factor, std::int64_t n) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t i = 0; i < n; ++i) {
    sum += y[i] * z[i];
    y[i] *= factor;
  }
  return sum;
}

// y[i] = sum_k factor[k] * x[k][i], or added to y. Every source is read once and y written once, however many there
// are.
template <class T>
static void combine(T* __restrict y, const T* const* x, const T* factor, int count, bool onto, std::int64_t n) {
  constexpr std::int64_t wide = 4, step = lanes<T>;  // that many sums under way hide each other's latency
  std::int64_t i = 0;
  for (; i + wide * step <= n; i += wide * step) {
    Vector<T> sum[wide] = {};
    if (onto)
#pragma GCC unroll 4
      for (int v = 0; v < wide; ++v) sum[v] = load_vector(static_cast<const T*>(y + i + v * step));
    for (int k = 0; k < count; ++k)
#pragma GCC unroll 4
      for (int v = 0; v < wide; ++v) sum[v] += load_vector(x[k] + i + v * step) * factor[k];
#pragma GCC unroll 4
    for (int v = 0; v < wide; ++v) store_vector(y + i + v * step, sum[v]);
  }
  for (; i + step <= n; i += step) {
    Vector<T> sum = {};
    if (onto) sum = load_vector(static_cast<const T*>(y + i));
    for (int k = 0; k < count; ++k) sum += load_vector(x[k] + i) * factor[k];
    store_vector(y + i, sum);
  }
  // The rest, less than a vector, channel by channel too: along the sources, the compiler would multiply some of them
  // apart from adding them, and a source of zeros would change the rounding of others.
  if (i == n) return;
  T rest[step] = {};
  if (onto) std::memcpy(rest, y + i, (n - i) * sizeof(T));
  for (int k = 0; k < count; ++k)
    for (std::int64_t lane = 0; lane < n - i; ++lane) rest[lane] += x[k][i + lane] * factor[k];
  std::memcpy(y + i, rest, (n - i) * sizeof(T));
}

// A linear combination that is collected source by source and then computed at once.
template <class T>
class Combination {
 public:
  void begin(T* y, std::int64_t n) {
    y_ = y;
    n_ = n;
    count_ = 0;
    onto_ = false;
  }

  void add(const T* x, T factor) {
    if (count_ == most) end();
    x_[count_] = x;
    factor_[count_++] = factor;
  }

  // Without any source, y becomes zero.
  void end() {
    if (onto_ && count_ == 0) return;
    combine(y_, x_, factor_, count_, onto_, n_);
    count_ = 0;
    onto_ = true;
  }

 private:
  static constexpr int most = 16;
  T* y_;
  std::int64_t n_;
  int count_;
  bool onto_;
  const T* x_[most];
  T factor_[most];
};
