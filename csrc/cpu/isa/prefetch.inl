// Memory asked for ahead of time. Included by rows.cpp only, inside its namespace.
//
// Products keep the arithmetic units busy and the memory idle; whatever is between products does the reverse. So while
// a product is computed, the rows that are worked on next come into the second-level cache, a few cache lines at a
// time: more would fill the queue of outstanding loads, and the product would wait for its own.

constexpr std::int64_t cache_line = 64;

// So many lines, every so many steps of a product.
constexpr std::int64_t lines_ahead = 6, steps_between = 16;

class Ahead {
 public:
  // Rows [begin, end) of a view, of so many elements each, where they are without gaps.
  void add(const View& view, std::int64_t begin, std::int64_t end, std::int64_t elements) {
    if (view.data == nullptr || view.row != elements || begin >= end || count_ == most) return;
    with_type(view.type, [&](auto* type) {
      using S = std::remove_pointer_t<decltype(type)>;
      const S* const data = static_cast<const S*>(view.data);
      run_[count_++] = {reinterpret_cast<const char*>(data + begin * elements),
                        reinterpret_cast<const char*>(data + end * elements)};
    });
  }

  // Where to begin with the next lines, for so many steps; `otherwise` where there is nothing left to ask for.
  const char* next(std::int64_t steps, const void* otherwise) {
    if (now_ == count_) return static_cast<const char*>(otherwise);
    Run& run = run_[now_];
    const char* const begin = run.begin;
    run.begin += (steps + steps_between - 1) / steps_between * lines_ahead * cache_line;
    if (run.begin >= run.end) ++now_;
    return begin;
  }

 private:
  struct Run {
    const char *begin, *end;
  };
  static constexpr int most = 4 * max_terms;
  Run run_[most];
  int count_ = 0, now_ = 0;
};
