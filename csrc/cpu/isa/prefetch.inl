// Prefetching, interleaved with products.
//
// Products keep the arithmetic units busy and the memory idle; the steps between products do the reverse. So while a
// product is computed, the rows of the next steps are loaded into the second-level cache, a few cache lines at a time:
// more would fill the queue of outstanding loads and delay the product's own.

constexpr std::int64_t cache_line = 64;

// Cache lines per prefetch, and steps of a product from one prefetch to the next.
constexpr std::int64_t prefetch_lines = 6, prefetch_interval = 16;

class Prefetcher {
 public:
  // Add rows [begin, end) of a view, each of `elements`, unless there are gaps between them.
  void add(const View& view, std::int64_t begin, std::int64_t end, std::int64_t elements) {
    if (view.data == nullptr || view.row != elements || begin >= end || count_ == capacity) return;
    dispatch_type(view.type, [&](auto* type) {
      using S = std::remove_pointer_t<decltype(type)>;
      const S* const data = static_cast<const S*>(view.data);
      range_[count_++] = {reinterpret_cast<const char*>(data + begin * elements),
                          reinterpret_cast<const char*>(data + end * elements)};
    });
  }

  // Return the address at which a product of `steps` starts prefetching; `fallback` when all ranges are done.
  const char* next(std::int64_t steps, const void* fallback) {
    if (current_ == count_) return static_cast<const char*>(fallback);
    Range& range = range_[current_];
    const char* const begin = range.begin;
    range.begin += (steps + prefetch_interval - 1) / prefetch_interval * prefetch_lines * cache_line;
    if (range.begin >= range.end) ++current_;
    return begin;
  }

 private:
  struct Range {
    const char *begin, *end;
  };
  static constexpr int capacity = 4 * max_terms;
  Range range_[capacity];
  int count_ = 0, current_ = 0;
};
