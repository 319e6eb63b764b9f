// Dot products and linear combinations of vectors.

template <class T>
static T dot(const T* __restrict x, const T* __restrict y, std::int64_t n) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t i = 0; i < n; ++i) sum += x[i] * y[i];
  return sum;
}

// y = factor * x; returns <x, z>
template <class T>
static T scale_into_and_dot(T* __restrict y, const T* __restrict x, const T* __restrict z, T factor, std::int64_t n) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t i = 0; i < n; ++i) {
    sum += x[i] * z[i];
    y[i] = factor * x[i];
  }
  return sum;
}

// y = factor * y; returns <y, z> of the old y
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

// y[i] = sum_k factor[k] * x[k][i], or added to y, in one pass over all sources and y.
template <class T>
static void combine(T* __restrict y, const T* const* x, const T* factor, int count, bool accumulate, std::int64_t n) {
  constexpr std::int64_t unroll = 4, step = lanes<T>;  // independent sums hide each other's latency
  std::int64_t i = 0;
  for (; i + unroll * step <= n; i += unroll * step) {
    Vector<T> sum[unroll] = {};
    if (accumulate)
#pragma GCC unroll 4
      for (int v = 0; v < unroll; ++v) sum[v] = load_vector(static_cast<const T*>(y + i + v * step));
    for (int k = 0; k < count; ++k)
#pragma GCC unroll 4
      for (int v = 0; v < unroll; ++v) sum[v] += load_vector(x[k] + i + v * step) * factor[k];
#pragma GCC unroll 4
    for (int v = 0; v < unroll; ++v) store_vector(y + i + v * step, sum[v]);
  }
  for (; i + step <= n; i += step) {
    Vector<T> sum = {};
    if (accumulate) sum = load_vector(static_cast<const T*>(y + i));
    for (int k = 0; k < count; ++k) sum += load_vector(x[k] + i) * factor[k];
    store_vector(y + i, sum);
  }
  // The remainder, less than a vector, with sources in the outer loop as well. In the inner loop, the compiler would
  // fuse only some multiplications with additions, and a source of zeros would change the rounding of others.
  if (i == n) return;
  T remainder[step] = {};
  if (accumulate) std::memcpy(remainder, y + i, (n - i) * sizeof(T));
  for (int k = 0; k < count; ++k)
    for (std::int64_t lane = 0; lane < n - i; ++lane) remainder[lane] += x[k][i + lane] * factor[k];
  std::memcpy(y + i, remainder, (n - i) * sizeof(T));
}

// Collects the sources of a linear combination, to compute it in one pass.
template <class T>
class Combination {
 public:
  void begin(T* y, std::int64_t n) {
    y_ = y;
    n_ = n;
    count_ = 0;
    accumulate_ = false;
  }

  void add(const T* x, T factor) {
    if (count_ == capacity) end();
    x_[count_] = x;
    factor_[count_++] = factor;
  }

  // Compute y; without sources, it becomes zero.
  void end() {
    if (accumulate_ && count_ == 0) return;
    combine(y_, x_, factor_, count_, accumulate_, n_);
    count_ = 0;
    accumulate_ = true;
  }

 private:
  static constexpr int capacity = 16;
  T* y_;
  std::int64_t n_;
  int count_;
  bool accumulate_;
  const T* x_[capacity];
  T factor_[capacity];
};
