// The CUDA kernels as plain functions: blocks in, launches out. No PyTorch, no Python, no allocation.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../squeeze.h"

namespace orepa::cuda {

// How the products of `composed` terms are computed; sums are float32 always. Before sm_80 all of them are float32.
enum class Precision {
  full,  // TF32 with two corrections in bfloat16: relative error near 2^-20
  tf32,  // operands rounded to TF32
  bf16,  // bfloat16 is allowed; TF32 is used
};

struct Context {
  int device = 0;
  std::uintptr_t stream = 0;
  Precision precision = Precision::full;
  void* workspace = nullptr;  // any content, 16-byte aligned
  std::int64_t workspace_bytes = 0;
  void* counters = nullptr;  // zero at first use; every launch leaves it zero
  std::int64_t counter_bytes = 0;
};

struct Needs {
  std::int64_t workspace_bytes = 0, counter_bytes = 0;
};

// Memory that `forward` or `backward` wants for these blocks, whichever gradients are asked for. Looks at shapes,
// strides and at which operands are present, not at where they lie: their `data` may be anything but null.
Needs needs(const Block* blocks, int count, bool backward);

// Squeezes all blocks, in one launch as long as their descriptions fit into kernel parameters.
// Throws std::invalid_argument for a block that `why_not` rejects or too little memory, std::runtime_error with CUDA's
// words.
void forward(const Block* blocks, int count, const Context& context);

// All gradients that are asked for, likewise in one launch. The same bits every time.
void backward(const Block* blocks, int count, const Context& context);

// "" or the reason why these kernels do not cover a block.
std::string why_not(const Block& block);

// Compute capabilities with code in this build, as major * 10 + minor.
std::vector<int> architectures();

}  // namespace orepa::cuda
