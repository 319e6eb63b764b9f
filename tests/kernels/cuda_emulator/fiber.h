// Fibers: call stacks that switch cooperatively, one per emulated thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>

#include <sys/mman.h>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulator {

#if defined(__x86_64__)

using Stack = void*;  // a suspended fiber is its stack pointer

extern "C" void orepa_emulator_switch(void** save, void* to);
asm(R"(
.text
.weak orepa_emulator_switch
.type orepa_emulator_switch,@function
orepa_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

inline void switch_to(Stack& from, Stack& to) {
  orepa_emulator_switch(&from, to);
}

inline void prepare(Stack& stack, char* memory, std::size_t bytes, void (*entry)()) {
  void** top = reinterpret_cast<void**>(reinterpret_cast<std::uintptr_t>(memory + bytes) & ~std::uintptr_t{15});
  *--top = nullptr;  // alignment, as after a call
  *--top = reinterpret_cast<void*>(entry);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  stack = top;
}

#else

using Stack = ucontext_t;

inline void switch_to(Stack& from, Stack& to) {
  swapcontext(&from, &to);
}

inline void prepare(Stack& stack, char* memory, std::size_t bytes, void (*entry)()) {
  getcontext(&stack);
  stack.uc_stack.ss_sp = memory;
  stack.uc_stack.ss_size = bytes;
  stack.uc_link = nullptr;
  makecontext(&stack, entry, 0);
}

#endif

// Memory for stacks, allocated once and reused.
class StackMemory {
 public:
  // Per stack. The address sanitizer's red zones take several times the space of the variables.
#ifdef __SANITIZE_ADDRESS__
  static constexpr std::size_t bytes = 1024 * 1024;
#else
  static constexpr std::size_t bytes = 64 * 1024;
#endif

  char* stack(std::size_t index, std::size_t count) {
    if (count > count_) {
      if (memory_ != nullptr) munmap(memory_, count_ * bytes);
      void* memory =
          mmap(nullptr, count * bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED) abort();
      memory_ = static_cast<char*>(memory);
      count_ = count;
    }
    return memory_ + index * bytes;
  }

 private:
  char* memory_ = nullptr;
  std::size_t count_ = 0;
};

}  // namespace emulator
