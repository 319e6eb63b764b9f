// Runs kernels block by block on one CPU thread. Each CUDA thread is a fiber that yields at barriers.
//
// It detects wrong indices and fragments, uninitialised shared memory (which is NaN), barriers that not all threads
// reach, lanes that meet in different warp instructions, writes next to shared memory, and results that depend on the
// order of thread blocks, warps or lanes, which `Settings::seed` permutes. It cannot detect races within a warp that
// happen to run in order, nor effects of a GPU's memory model.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "fiber.h"

namespace emulator {

struct Settings {
  std::uint64_t seed = 0;  // 0: in index order
  std::int64_t launches = 0;
  int driver = 13000;  // CUDA version
  bool can_load = true;
};
inline Settings settings;

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

constexpr int lanes = 32;

// What a thread waits for; all lanes of a warp must wait for the same.
enum class Wait : std::uint8_t { nothing, block, warp, shuffle, matrix_load, matrix_product, finished };

// An asynchronous copy to shared memory, done when the thread waits for its copies.
struct Copy {
  void* to;
  const void* from;
  int bytes;
  bool inside;
};

struct Thread {
  Stack stack;
  Index index;
  int rank = 0;
  Wait wait = Wait::nothing;
  unsigned turn = 0;  // parity of warp instructions: a lane may be one instruction ahead of a lane that still reads
  std::uint64_t message[2][8];  // what a lane sends to its warp
  int vote = 0;
  std::vector<Copy> copies;  // pending
};

class Machine {
 public:
#ifdef __SANITIZE_ADDRESS__
  static constexpr std::size_t guard = 0;  // the sanitizer's guard detects reads as well
#else
  static constexpr std::size_t guard = 256;
#endif
  // NaN as a float, out of range as an index. Not -1, which means a line of zeros in the kernels' tables.
  static constexpr unsigned poison = 0x7fbfbfbf;

  Thread* current = nullptr;
  Index block;
  unsigned block_threads = 0, grid_blocks = 0;
  int vote = 0;

  unsigned char* shared() { return shared_.get() + guard; }

  void launch(const std::function<void()>& kernel, unsigned grid, int threads, int shared_bytes) {
    ++settings.launches;
    kernel_ = &kernel;
    grid_blocks = grid;
    block_threads = static_cast<unsigned>(threads);
    threads_.resize(threads);
    for (int i = 0; i < threads; ++i) threads_[i].rank = i;
    shared_bytes_ = static_cast<std::size_t>(shared_bytes);
    std::vector<unsigned> order = permutation(grid, settings.seed);
    for (unsigned number : order) {
      block = {number, 0, 0};
      run_block(settings.seed == 0 ? 0 : settings.seed + number + 1);
    }
  }

  void yield(Wait wait) {
    Thread& thread = *current;
    thread.wait = wait;
    switch_to(thread.stack, scheduler_);
  }

  // Report a fault of the current thread. Fibers cannot throw: the handler is on another stack.
  [[noreturn]] void fault(const char* what) {
    fault_ = what;
    yield(Wait::finished);
    abort();
  }

  const Thread& lane(int number) const { return threads_[current->rank / lanes * lanes + number]; }

 private:
  static std::vector<unsigned> permutation(unsigned count, std::uint64_t seed) {
    std::vector<unsigned> order(count);
    std::iota(order.begin(), order.end(), 0u);
    if (seed != 0) std::shuffle(order.begin(), order.end(), std::mt19937_64(seed));
    return order;
  }

  static void entry();

  static unsigned char poison_at(std::size_t byte) { return static_cast<unsigned char>(poison >> (8 * (byte % 4))); }

  void run_block(std::uint64_t seed) {
    // Of the exact size, so that the address sanitizer detects accesses outside.
    shared_.reset(new (std::align_val_t{16}) unsigned char[shared_bytes_ + 2 * guard]);
    for (std::size_t i = 0; i < shared_bytes_ + 2 * guard; ++i) shared_[i] = poison_at(i);
    for (Thread& thread : threads_) {
      thread.index = {static_cast<unsigned>(thread.rank), 0, 0};
      thread.wait = Wait::nothing;
      thread.turn = 0;
      thread.copies.clear();
      prepare(thread.stack, stacks_.stack(thread.rank, threads_.size()), StackMemory::bytes, &Machine::entry);
    }
    const int warps = static_cast<int>(threads_.size()) / lanes;
    std::vector<unsigned> warp_order = permutation(warps, seed), lane_order = permutation(lanes, seed);
    std::size_t finished = 0;
    while (finished < threads_.size()) {
      for (unsigned warp : warp_order) finished += run_warp(threads_.data() + warp * lanes, lane_order);
      if (finished == threads_.size()) break;
      if (finished > 0 ||
          std::any_of(threads_.begin(), threads_.end(), [](const Thread& t) { return t.wait != Wait::block; }))
        fail("some threads wait at a barrier that others never reach");
      vote = 0;
      for (Thread& thread : threads_) vote |= thread.vote;
      for (Thread& thread : threads_) thread.wait = Wait::nothing;
    }
    for (std::size_t i = 0; i < guard; ++i)
      if (shared_[i] != poison_at(i) || shared_[guard + shared_bytes_ + i] != poison_at(guard + shared_bytes_ + i))
        fail("a write outside of shared memory");
  }

  // Run a warp until all lanes wait at a block barrier or have finished; return how many have finished.
  std::size_t run_warp(Thread* warp, const std::vector<unsigned>& order) {
    std::size_t finished = 0;
    for (;;) {
      for (unsigned number : order) {
        Thread& thread = warp[number];
        if (thread.wait != Wait::nothing) continue;
        current = &thread;
        switch_to(scheduler_, thread.stack);
        if (fault_ != nullptr) fail(std::exchange(fault_, nullptr));
        finished += thread.wait == Wait::finished;
      }
      const Wait wait = warp[0].wait;
      for (int i = 1; i < lanes; ++i)
        if (warp[i].wait != wait) fail("the lanes of a warp wait for different things");
      if (wait == Wait::block || wait == Wait::finished) return finished;
      for (int i = 0; i < lanes; ++i) warp[i].wait = Wait::nothing;
    }
  }

  [[noreturn]] void fail(const std::string& what) const {
    throw std::runtime_error("emulator, block " + std::to_string(block.x) + ": " + what);
  }

  struct Aligned {
    void operator()(unsigned char* memory) const { operator delete[](memory, std::align_val_t{16}); }
  };

  const std::function<void()>* kernel_ = nullptr;
  const char* fault_ = nullptr;
  std::vector<Thread> threads_;
  StackMemory stacks_;
  Stack scheduler_;
  std::unique_ptr<unsigned char[], Aligned> shared_;
  std::size_t shared_bytes_ = 0;
};

inline Machine machine;

inline void Machine::entry() {
  (*machine.kernel_)();
  machine.yield(Wait::finished);
  abort();
}

inline void launch(const std::function<void()>& kernel, unsigned grid, int threads, int shared_bytes) {
  machine.launch(kernel, grid, threads, shared_bytes);
}

inline unsigned char* shared_memory() {
  return machine.shared();
}

// Send `message` to the warp, wait for all lanes, and return the `turn` under which `message_of` finds the messages.
template <class T>
unsigned exchange(const T& message, Wait instruction) {
  static_assert(sizeof(T) <= sizeof(Thread::message[0]));
  Thread& thread = *machine.current;
  const unsigned turn = thread.turn++ % 2;
  std::memcpy(thread.message[turn], &message, sizeof(T));
  machine.yield(instruction);
  return turn;
}

template <class T>
T message_of(int lane, unsigned turn) {
  T message;
  std::memcpy(&message, machine.lane(lane).message[turn], sizeof(T));
  return message;
}

inline void copy_async(void* to, const void* from, int bytes, bool inside) {
  for (std::uintptr_t address : {reinterpret_cast<std::uintptr_t>(to), reinterpret_cast<std::uintptr_t>(from)})
    if (address % bytes != 0) machine.fault("a misaligned copy");
  machine.current->copies.push_back({to, from, bytes, inside});
}

inline void wait_for_copies() {
  for (const Copy& copy : machine.current->copies) {
    if (copy.inside) {
      std::memcpy(copy.to, copy.from, copy.bytes);
    } else {
      std::memset(copy.to, 0, copy.bytes);
    }
  }
  machine.current->copies.clear();
}

inline int current_lane() {
  return machine.current->rank % lanes;
}

}  // namespace emulator
