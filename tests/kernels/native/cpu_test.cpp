// Tests of the CPU kernels without Python, for sanitizers and debuggers.
//
// Forward is compared with the formulas of csrc/squeeze.h. Backward is compared with forward: W is linear in each
// operand X, so <G, W(X + D) - W(X)> = <grad X, D> for any change D, without an approximation.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "../../../csrc/cpu/api.h"

using namespace orepa;

namespace {

std::mt19937_64 random_bits(1);

// A tensor of doubles in either memory order.
struct Tensor {
  std::int64_t rows = 0, columns = 0, taps = 0;
  bool taps_inside = true;
  std::vector<double> memory;

  Tensor() = default;
  Tensor(std::int64_t rows, std::int64_t columns, std::int64_t taps, bool taps_inside)
      : rows(rows), columns(columns), taps(taps), taps_inside(taps_inside), memory(rows * columns * taps) {
    std::normal_distribution<double> normal;
    for (double& value : memory) value = normal(random_bits);
  }

  View view() {
    const std::int64_t row = columns * taps;
    return {memory.data(), row, taps_inside ? taps : 1, taps_inside ? 1 : columns, Type::float64};
  }

  double& at(std::int64_t r, std::int64_t c, std::int64_t t) {
    return memory[r * columns * taps + (taps_inside ? c * taps + t : t * columns + c)];
  }
};

double inner(Tensor& a, Tensor& b) {
  double sum = 0;
  for (std::int64_t r = 0; r < a.rows; ++r)
    for (std::int64_t c = 0; c < a.columns; ++c)
      for (std::int64_t t = 0; t < a.taps; ++t) sum += a.at(r, c, t) * b.at(r, c, t);
  return sum;
}

struct Case {
  std::int64_t out_per_group, in_per_group, groups, inner, expand;
  int height, width;
  bool taps_inside;
};

enum { origin, pointwise, filter, first, second, depthwise, expanded, scales, operands };

struct Problem {
  Case size;
  Tensor operand[operands];
  Block block;

  explicit Problem(const Case& size) : size(size) {
    const std::int64_t o = size.out_per_group * size.groups, taps = size.height * size.width;
    const bool inside = size.taps_inside;
    operand[origin] = Tensor(o, size.in_per_group, taps, inside);
    operand[pointwise] = Tensor(o, size.in_per_group, 1, inside);
    operand[filter] = Tensor(o, 1, taps, inside);
    operand[first] = Tensor(size.inner * size.groups, size.in_per_group, 1, inside);
    operand[second] = Tensor(o, size.inner, taps, inside);
    operand[depthwise] = Tensor(size.in_per_group * size.groups * size.expand, 1, taps, inside);
    operand[expanded] = Tensor(o, size.in_per_group * size.expand, 1, inside);
    operand[scales] = Tensor(4, o, 1, inside);
    block.out_channels = o;
    block.in_per_group = size.in_per_group;
    block.groups = size.groups;
    block.height = size.height;
    block.width = size.width;
    block.terms = 4;
    const Kind kinds[] = {Kind::dense, Kind::pointwise, Kind::composed, Kind::separable};
    for (int index = 0; index < 4; ++index) {
      Term& term = block.term[index];
      term.kind = kinds[index];
      term.scale = index;
      term.height = size.height;
      term.width = size.width;
    }
    block.term[2].inner = static_cast<int>(size.inner);
    block.term[2].identity = size.inner % size.in_per_group == 0;
    block.term[3].inner = static_cast<int>(size.expand);
    bind();
  }

  void bind() {
    block.term[0].a = operand[origin].view();
    block.term[1].a = operand[pointwise].view();
    block.term[1].b = operand[filter].view();
    block.term[2].a = operand[first].view();
    block.term[2].b = operand[second].view();
    block.term[3].a = operand[depthwise].view();
    block.term[3].b = operand[expanded].view();
    block.scales = operand[scales].view();
  }

  // The formulas of csrc/squeeze.h, one element at a time.
  double expected(std::int64_t o, std::int64_t i, std::int64_t t) {
    const std::int64_t group = o / size.out_per_group;
    double composed = 0, separable = 0;
    for (std::int64_t m = 0; m < size.inner; ++m) {
      const bool on_diagonal = block.term[2].identity && m % size.in_per_group == i;
      composed += operand[second].at(o, m, t) * (operand[first].at(group * size.inner + m, i, 0) + on_diagonal);
    }
    for (std::int64_t e = 0; e < size.expand; ++e)
      separable += operand[expanded].at(o, i * size.expand + e, 0) *
                   operand[depthwise].at((group * size.in_per_group + i) * size.expand + e, 0, t);
    return operand[scales].at(0, o, 0) * operand[origin].at(o, i, t) +
           operand[scales].at(1, o, 0) * operand[pointwise].at(o, i, 0) * operand[filter].at(o, 0, t) +
           operand[scales].at(2, o, 0) * composed + operand[scales].at(3, o, 0) * separable;
  }

  void forward(Tensor& kernel, int threads) {
    block.kernel = kernel.view();
    cpu::forward(block, {Type::float64, threads});
  }

  void backward(Tensor& upstream, Tensor* gradient, int threads) {
    block.term[0].grad_a = gradient[origin].view();
    block.term[1].grad_a = gradient[pointwise].view();
    block.term[1].grad_b = gradient[filter].view();
    block.term[2].grad_a = gradient[first].view();
    block.term[2].grad_b = gradient[second].view();
    block.term[3].grad_a = gradient[depthwise].view();
    block.term[3].grad_b = gradient[expanded].view();
    block.grad_scales = gradient[scales].view();
    block.kernel = upstream.view();
    cpu::backward(block, {Type::float64, threads});
  }
};

int failures = 0;

void expect_close(double got, double expected, double size, const char* what, int number) {
  if (std::abs(got - expected) <= 1e-10 * (1 + size)) return;
  ++failures;
  std::printf("case %d, %s: got %.15g, expected %.15g\n", number, what, got, expected);
}

void check(const Case& size, int number) {
  Problem problem(size);
  const std::int64_t taps = problem.block.taps(), o_all = problem.block.out_channels;
  Tensor kernel(o_all, size.in_per_group, taps, !size.taps_inside), upstream(o_all, size.in_per_group, taps, true);
  problem.forward(kernel, 2);
  for (std::int64_t o = 0; o < o_all; ++o)
    for (std::int64_t i = 0; i < size.in_per_group; ++i)
      for (std::int64_t t = 0; t < taps; ++t)
        expect_close(kernel.at(o, i, t), problem.expected(o, i, t), 10, "kernel", number);

  Tensor gradient[operands];
  for (int index = 0; index < operands; ++index) {
    gradient[index] = problem.operand[index];
    gradient[index].memory.assign(gradient[index].memory.size(), std::nan(""));
  }
  problem.backward(upstream, gradient, 2);
  const char* names[] = {"origin", "pointwise", "filter", "first", "second", "depthwise", "expanded", "scales"};
  for (int index = 0; index < operands; ++index) {
    Tensor& x = problem.operand[index];
    Tensor change(x.rows, x.columns, x.taps, x.taps_inside), changed = kernel;
    const std::vector<double> before = x.memory;
    for (std::size_t i = 0; i < x.memory.size(); ++i) x.memory[i] += change.memory[i];
    problem.bind();
    problem.forward(changed, 1);
    x.memory = before;
    double difference = 0, magnitude = 0;
    for (std::int64_t o = 0; o < o_all; ++o)
      for (std::int64_t i = 0; i < size.in_per_group; ++i)
        for (std::int64_t t = 0; t < taps; ++t) {
          const double part = upstream.at(o, i, t) * (changed.at(o, i, t) - kernel.at(o, i, t));
          difference += part;
          magnitude += std::abs(part);
        }
    expect_close(inner(gradient[index], change), difference, magnitude, names[index], number);
  }
}

}  // namespace

int main() {
  const Case cases[] = {
      {5, 3, 1, 6, 8, 3, 3, true},    {5, 3, 1, 6, 8, 3, 3, false},   {17, 19, 1, 19, 8, 3, 3, true},
      {16, 32, 2, 64, 8, 3, 3, true}, {9, 8, 3, 8, 3, 1, 5, true},    {1, 1, 4, 2, 1, 1, 1, true},
      {33, 7, 2, 5, 4, 2, 4, false},  {40, 70, 1, 70, 8, 5, 5, true}, {300, 250, 1, 7, 8, 3, 5, true},
  };
  int number = 0;
  for (const Case& size : cases) check(size, number++);
  std::printf("%s: %d cases, %d failures\n", cpu::instruction_set(), number, failures);
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
