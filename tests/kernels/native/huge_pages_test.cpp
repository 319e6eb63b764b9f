// Tests that large results, and only those, are advised to use huge pages (csrc/cpu/huge_pages.h).

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string>

#include "../../../csrc/cpu/api.h"

using namespace orepa;

namespace {

// A mapping of its own, without any advice yet.
struct Mapping {
  std::size_t bytes;
  float* data;

  explicit Mapping(std::size_t elements)
      : bytes(elements * sizeof(float)),
        data(static_cast<float*>(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0))) {
    if (data == MAP_FAILED) std::abort();
  }
  ~Mapping() { munmap(data, bytes); }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  // Return whether the part that contains its middle has the flag `hg`.
  bool has_huge_page_advice() const {
    const unsigned long middle = reinterpret_cast<unsigned long>(data) + bytes / 2;
    std::ifstream mappings("/proc/self/smaps");
    bool inside = false;
    for (std::string line; std::getline(mappings, line);) {
      unsigned long begin = 0, end = 0;
      if (std::sscanf(line.c_str(), "%lx-%lx ", &begin, &end) == 2) inside = begin <= middle && middle < end;
      if (inside && line.rfind("VmFlags:", 0) == 0) return (line + " ").find(" hg ") != std::string::npos;
    }
    std::abort();
  }
};

// Run forward and backward of one dense term in new memory. Return 10 if the kernel has the advice, plus 1 if the
// gradient has.
int advised(std::int64_t out_channels) {
  constexpr std::int64_t columns = 64, taps = 9;
  const std::size_t size = static_cast<std::size_t>(out_channels * columns * taps);
  const Mapping weight(size), kernel(size), upstream(size), gradient(size);
  const auto view = [&](const Mapping& memory) { return View{memory.data, columns * taps, taps, 1, Type::float32}; };
  Block block;
  block.out_channels = out_channels;
  block.in_per_group = columns;
  block.height = block.width = 3;
  block.terms = 1;
  block.term[0].height = block.term[0].width = 3;
  block.term[0].a = view(weight);
  block.kernel = view(kernel);
  cpu::forward(block, {Type::float32, 1});
  block.term[0].grad_a = view(gradient);
  block.kernel = view(upstream);
  cpu::backward(block, {Type::float32, 1});
  if (weight.has_huge_page_advice() || upstream.has_huge_page_advice()) return -1;  // inputs must not have it
  return 10 * kernel.has_huge_page_advice() + gradient.has_huge_page_advice();
}

}  // namespace

int main() {
  if (!std::ifstream("/sys/kernel/mm/transparent_hugepage/enabled")) {
    std::printf("this system has no huge pages\n");
    return EXIT_SUCCESS;
  }
  const int large = advised(4096), small = advised(256);
  std::printf("large: %d (expected 11), small: %d (expected 0)\n", large, small);
  return large == 11 && small == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
