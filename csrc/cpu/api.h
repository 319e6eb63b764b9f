// The squeeze on a CPU. Results are bitwise independent of the number of threads and of their scheduling.
#pragma once

#include "../squeeze.h"

namespace orepa::cpu {

struct Context {
  Type compute = Type::float32;  // precision of the arithmetic: float32 or float64
  int threads = 1;               // at most
};

// Return whether this build can read and write elements of a type (float16 needs a recent compiler).
bool supports_type(Type type);

// Return the instruction set in use, such as "avx512".
const char* instruction_set();

// Write `block.kernel`.
void forward(const Block& block, const Context& context);

// Write the gradients that have memory in `block`, given dW in `block.kernel`.
void backward(const Block& block, const Context& context);

}  // namespace orepa::cpu
