// The CUDA kernels as plain functions: blocks in, launches out. No PyTorch, no Python, no allocation.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../squeeze.h"

namespace orepa::cuda {

// Precision of the products of composed terms where W (or dW) is float32; sums are always float32. For a W of 16 bits,
// operands are always rounded to TF32. Before sm_80, products are float32.
enum class Precision {
  full,  // TF32 with two corrections in bfloat16: relative error near 2^-20
  tf32,  // operands rounded to TF32
  bf16,  // allows bfloat16, but uses TF32
};

struct Context {
  int device = 0;
  std::uintptr_t stream = 0;
  Precision precision = Precision::full;
  void* workspace = nullptr;  // uninitialized, 16-byte aligned
  std::int64_t workspace_bytes = 0;
  void* counters = nullptr;  // zero before the first launch; every launch leaves them zero
  std::int64_t counter_bytes = 0;
};

struct MemoryNeeds {
  std::int64_t workspace_bytes = 0, counter_bytes = 0;
};

// Return the memory that `forward` or `backward` needs for these blocks, for any subset of gradients. It depends on
// shapes, strides and on which operands are present (`data` not null), not on addresses.
MemoryNeeds memory_needs(const Block* blocks, int count, bool backward);

// Squeeze all blocks, in one launch if their descriptions fit into kernel parameters.
// Throws std::invalid_argument for unsupported blocks or too little memory, std::runtime_error with CUDA's message.
void forward(const Block* blocks, int count, const Context& context);

// Compute all gradients that have memory, likewise in one launch. Bitwise deterministic.
void backward(const Block* blocks, int count, const Context& context);

// Return the reason why these kernels do not support a block, or "".
std::string unsupported_reason(const Block& block);

// Return why the kernels cannot run here, or "": the driver may be too old for this build's CUDA runtime. With a
// device, which gets a context, also whether it can load a kernel; without one (-1), no context is made.
std::string unusable_reason(int device);

// Return the compute capabilities with code in this build, as major * 10 + minor.
std::vector<int> architectures();

}  // namespace orepa::cuda
