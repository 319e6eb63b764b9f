// Whether large results, and only those, are announced to the system: see csrc/cpu/huge_pages.h.

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string>

#include "../../../csrc/cpu/api.h"

using namespace orepa;

namespace {

// Memory that nothing else has touched or said anything about.
struct Fresh {
  std::size_t bytes;
  float* data;

  explicit Fresh(std::size_t elements)
      : bytes(elements * sizeof(float)),
        data(static_cast<float*>(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0))) {
    if (data == MAP_FAILED) std::abort();
  }
  ~Fresh() { munmap(data, bytes); }
  Fresh(const Fresh&) = delete;
  Fresh& operator=(const Fresh&) = delete;

  // Whether the mapping that holds its middle has the flag `hg`.
  bool wants_huge_pages() const {
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

// A block of one dense term, squeezed and differentiated in fresh memory; the kernel's and the gradient's answer.
int announced(std::int64_t out_channels) {
  constexpr std::int64_t columns = 64, taps = 9;
  const std::size_t size = static_cast<std::size_t>(out_channels * columns * taps);
  const Fresh weight(size), kernel(size), upstream(size), gradient(size);
  const auto view = [&](const Fresh& memory) { return View{memory.data, columns * taps, taps, 1, Type::float32}; };
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
  if (weight.wants_huge_pages() || upstream.wants_huge_pages()) return -1;  // only what is written
  return 10 * kernel.wants_huge_pages() + gradient.wants_huge_pages();
}

}  // namespace

int main() {
  if (!std::ifstream("/sys/kernel/mm/transparent_hugepage/enabled")) {
    std::printf("this system has no huge pages\n");
    return EXIT_SUCCESS;
  }
  const int large = announced(4096), small = announced(256);
  std::printf("large: %d (11 wanted), small: %d (0 wanted)\n", large, small);
  return large == 11 && small == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
