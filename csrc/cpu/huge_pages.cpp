#include "huge_pages.h"

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace orepa::cpu {

#if defined(__linux__) && defined(MADV_HUGEPAGE)

// Smaller tensors seldom contain an aligned huge page, and malloc reuses their memory.
constexpr std::uintptr_t min_bytes = std::uintptr_t{4} << 20;

void advise_huge_pages(const View& view, std::int64_t rows, std::int64_t elements) {
  if (view.data == nullptr || view.row != elements) return;
  const std::int64_t size = view.type == Type::float64 ? 8 : view.type == Type::float32 ? 4 : 2;
  const std::uintptr_t bytes = static_cast<std::uintptr_t>(rows * elements * size);
  if (bytes < min_bytes) return;
  // Only pages that lie in the tensor entirely: its neighbours on the heap are not ours.
  static const std::uintptr_t page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
  const std::uintptr_t data = reinterpret_cast<std::uintptr_t>(view.data);
  const std::uintptr_t begin = (data + page - 1) / page * page, end = (data + bytes) / page * page;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // only a hint: failure changes nothing
}

#else

void advise_huge_pages(const View&, std::int64_t, std::int64_t) {}

#endif

}  // namespace orepa::cpu
