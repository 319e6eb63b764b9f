// The squeeze on a CPU: everything but the matrix products, which are the business of the caller's BLAS.
//
// A block is worked on in pieces, [begin, end) of its output channels, small enough that the matrix products of a piece
// stay near the processor; see `pieces`. Per piece,
//   forward:   `pack` the second factor of each composed term, multiply with the first, call `forward`;
//   backward:  `backward` for all terms but the composed ones, then per composed term `gather` (where `needs_gather`),
//   two
//              products, and `composed_backward`.
// Buffers of a piece begin with its first output channel. Results depend neither on the number of threads nor on which
// thread does what: pieces, and the runs that sums are taken in, are fixed by the block alone.
#pragma once

#include <utility>
#include <vector>

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

// The pieces of a block, in order. A piece is a part of one group, or one or more whole groups.
std::vector<std::pair<std::int64_t, std::int64_t>> pieces(const Block& block);

// out: [rows][taps][columns] for rows [begin, end) of the view, each times its factor (a vector, or absent).
void pack(const View& view, const View& factor, std::int64_t begin, std::int64_t end, std::int64_t columns,
          std::int64_t taps, void* out, const Context& context);

void unpack(const void* panels, std::int64_t rows, std::int64_t columns, std::int64_t taps, const View& view,
            const Context& context);

// products: per term the matrix product of a composed one, [rows][taps of b][taps of a][Ig], otherwise null.
void forward(const Block& block, const void* const* products, std::int64_t begin, std::int64_t end,
             const Context& context);

// panels: [rows][taps][Ig], filled with dW; may be the piece of `block.kernel` itself where that lies so already.
// Pieces must come in order, on one thread: sums over output channels go on from piece to piece.
void backward(const Block& block, void* panels, std::int64_t begin, std::int64_t end, const Context& context);

// product: dW a^T, [rows][taps of b][inner].
void composed_backward(const Block& block, int term, const void* panels, const void* product, std::int64_t begin,
                       std::int64_t end, const Context& context);

// Whether a composed term multiplies something else than dW's own panels.
bool needs_gather(const Block& block, int term);

// out: [rows][taps of b][taps of a][Ig].
void gather(const Block& block, int term, const void* panels, void* out, std::int64_t begin, std::int64_t end,
            const Context& context);

}  // namespace orepa::cpu
