// The squeeze on a CPU. Results depend neither on the number of threads nor on which thread does what.
#pragma once

#include "../squeeze.h"

namespace orepa::cpu {

// How to compute: in float32 or float64, on at most so many threads.
struct Context {
  Type compute = Type::float32;
  int threads = 1;
};

// Whether this build can read and write elements of a type (float16 needs a recent compiler).
bool knows(Type type);

// The instruction set in use, such as "avx512".
const char* instruction_set();

// Writes `block.kernel`.
void forward(const Block& block, const Context& context);

// Writes the gradients that the block has places for, from dW, its `kernel`.
void backward(const Block& block, const Context& context);

}  // namespace orepa::cpu
