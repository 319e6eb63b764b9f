// The CUDA kernels, compiled for the CPU with tests/kernels/cuda_emulator, behind a C interface for the tests.
#include <cstdio>
#include <exception>

#include "../../../csrc/cuda/backward.cu"
#include "../../../csrc/cuda/forward.cu"
#include "../../../csrc/cuda/schedule.cpp"

using namespace orepa;

namespace {

template <class Work>
int guarded(char* error, int capacity, const Work& work) {
  try {
    work();
    return 0;
  } catch (const std::exception& exception) {
    std::snprintf(error, capacity, "%s", exception.what());
    return 1;
  }
}

// Faults that the emulator must detect, one per kernel.
void faulty(int fault) {
  emulator::launch(
      [fault] {
        float* shared = reinterpret_cast<float*>(emulator::shared_memory());
        if (fault == 0 && threadIdx.x < 32) __syncthreads();   // not all warps
        if (fault == 1 && threadIdx.x % 2 == 0) __syncwarp();  // not all lanes
        if (fault == 2) shared[32 * 64 + threadIdx.x % 2] = 0.0f;
        if (fault == 3 && threadIdx.x % 32 == 0) emulator::copy_async(shared + 1, shared, 16, false);
      },
      1, 64, 32 * 64 * 4);
}

}  // namespace

extern "C" {

int orepa_fault(int fault, char* error, int capacity) {
  return guarded(error, capacity, [&] { faulty(fault); });
}

// A sum in the order in which thread blocks run, as float atomics would compute it.
float orepa_unordered_sum(const float* values, int count) {
  float sum = 0.0f;
  emulator::launch([&] { sum += threadIdx.x == 0 ? values[blockIdx.x] : 0.0f; }, static_cast<unsigned>(count), 32, 0);
  return sum;
}

// Read shared memory that no thread wrote.
float orepa_unwritten() {
  float value = 0.0f;
  emulator::launch([&] { value = reinterpret_cast<float*>(emulator::shared_memory())[threadIdx.x]; }, 1, 32, 128);
  return value;
}

// One matrix instruction, d = a * b + c, on the register fragments of 32 lanes.
void orepa_mma(int bfloat16, const unsigned (*a)[4], const unsigned (*b)[2], const float (*c)[4], float (*d)[4]) {
  emulator::launch(
      [&] {
        const unsigned lane = threadIdx.x;
        bfloat16 != 0 ? emulator::mma_m16n8k16_bfloat16(d[lane], a[lane], b[lane], c[lane])
                      : emulator::mma_m16n8k8_tf32(d[lane], a[lane], b[lane], c[lane]);
      },
      1, 32, 0);
}

// Sizes of the structs, to check the caller's declarations.
void orepa_sizes(int* sizes) {
  sizes[0] = sizeof(View);
  sizes[1] = sizeof(Term);
  sizes[2] = sizeof(Block);
  sizes[3] = max_terms;
}

void orepa_seed(std::uint64_t seed) {
  emulator::settings.seed = seed;
}

std::int64_t orepa_launches() {
  return emulator::settings.launches;
}

int orepa_needs(const Block* blocks, int count, int backward, std::int64_t* bytes, char* error, int capacity) {
  return guarded(error, capacity, [&] {
    const cuda::MemoryNeeds needs = cuda::memory_needs(blocks, count, backward != 0);
    bytes[0] = needs.workspace_bytes;
    bytes[1] = needs.counter_bytes;
  });
}

int orepa_run(const Block* blocks, int count, int backward, int precision, void* workspace,
              std::int64_t workspace_bytes, void* counters, std::int64_t counter_bytes, char* error, int capacity) {
  return guarded(error, capacity, [&] {
    const cuda::Context context{
        0, 0, static_cast<cuda::Precision>(precision), workspace, workspace_bytes, counters, counter_bytes};
    backward != 0 ? cuda::backward(blocks, count, context) : cuda::forward(blocks, count, context);
  });
}

int orepa_unusable_reason(int device, int driver, int can_load, char* reason, int capacity) {
  emulator::settings.driver = driver;
  emulator::settings.can_load = can_load != 0;
  std::snprintf(reason, capacity, "%s", cuda::unusable_reason(device).c_str());
  return 0;
}

int orepa_unsupported_reason(const Block* block, char* reason, int capacity) {
  const std::string text = cuda::unsupported_reason(*block);
  std::snprintf(reason, capacity, "%s", text.c_str());
  return text.empty() ? 0 : 1;
}
}
