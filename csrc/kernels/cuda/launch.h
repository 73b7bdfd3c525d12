// What every launcher needs: facts about the current device, launch checks, and shared memory above 48 KB.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>

namespace pyquant::cuda {

struct Device {
  int index;
  int arch;  // 10 · major + minor
  int sm_count;
};

// The current device, its attributes asked for once.
const Device& current_device();

// Throws std::runtime_error if the last launch failed: "<kernel> <problem>: <CUDA's message>".
void check_launch(const char* kernel, const std::string& problem);

// Allows `kernel` that many bytes of dynamic shared memory on the current device, once per device.
void allow_shared_memory(const void* kernel, const char* name, int bytes);

// A grid that is too large for one launch dimension is refused with a message; the kernels' tiles make that
// unreachable for tensors that fit a GPU.
unsigned grid_size(int64_t blocks, const char* kernel);

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline bool aligned_16(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace pyquant::cuda
