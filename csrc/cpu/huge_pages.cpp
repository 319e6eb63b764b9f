#include "huge_pages.h"

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace orepa::cpu {

#if defined(__linux__) && defined(MADV_HUGEPAGE)

// Smaller tensors seldom hold a huge page that is aligned, and malloc keeps their memory.
constexpr std::uintptr_t worth_asking = std::uintptr_t{4} << 20;

void about_to_fill(const View& view, std::int64_t rows, std::int64_t elements) {
  if (view.data == nullptr || view.row != elements) return;
  const std::int64_t size = view.type == Type::float64 ? 8 : view.type == Type::float32 ? 4 : 2;
  const std::uintptr_t bytes = static_cast<std::uintptr_t>(rows * elements * size);
  if (bytes < worth_asking) return;
  // Whole pages of the tensor only: what lies beside it in the heap is not ours.
  static const std::uintptr_t page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
  const std::uintptr_t data = reinterpret_cast<std::uintptr_t>(view.data);
  const std::uintptr_t begin = (data + page - 1) / page * page, end = (data + bytes) / page * page;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a refusal changes nothing
}

#else

void about_to_fill(const View&, std::int64_t, std::int64_t) {}

#endif

}  // namespace orepa::cpu
