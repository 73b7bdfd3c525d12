// What every launcher needs: facts about the current device, launches, their checks, and shared memory above 48 KB.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>
#include <type_traits>

namespace pyquant::cuda {

constexpr int kMaxDevices = 64;

struct Device {
  int index;
  int arch;  // 10 · major + minor
  int sm_count;
};

// The current device, its attributes asked for once.
const Device& current_device();

// Throws std::runtime_error if the last launch failed: "<kernel> <problem>: <CUDA's message>".
void check_launch(const char* kernel, const std::string& problem);

// Whether the code of `kernel` for the current device was compiled with the features of compute capability 9.0:
// clusters and griddepcontrol (ptx/cluster.h). Not the device's own capability: there the kernel may run from sm_80's
// PTX.
bool has_sm_90_code(const void* kernel);

// Whether the library has machine code for sm_90a, and the current device runs it.
bool has_sm_90a_code();

struct Launch {
  dim3 grid, block;
  int shared_bytes;  // above 48 KB, after allow_shared_memory
  cudaStream_t stream;
  // Blocks along x in a cluster; divides grid.x. More than 1 needs has_sm_90_code.
  unsigned cluster = 1;
  // Programmatic dependent launch, where has_sm_90_code: the kernel may start while the stream's previous kernel is
  // still running, so that it must call ptx::wait_for_previous_kernel before it touches memory that others touch.
  bool early = false;
};

// How many clusters of such a launch (whatever its grid) the device holds at a time; blocks, without clusters.
int resident_clusters(const void* kernel, const Launch& launch);

// As check_launch, for a launch with these attributes.
void launch_kernel(const char* name, const std::string& problem, const Launch& launch, const void* kernel,
                   void** arguments);

template <typename... Parameters>
void launch_kernel(const char* name, const std::string& problem, const Launch& launch, void (*kernel)(Parameters...),
                   const std::enable_if_t<true, Parameters>&... arguments) {
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
  launch_kernel(name, problem, launch, reinterpret_cast<const void*>(kernel), pointers);
}

// Allows `kernel` that many bytes of dynamic shared memory on the current device, once per device.
void allow_shared_memory(const void* kernel, const char* name, int bytes);

// A grid that is too large for one launch dimension is refused with a message; the kernels' tiles make that
// unreachable for tensors that fit a GPU.
unsigned grid_size(int64_t blocks, const char* kernel);

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline bool aligned_16(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace pyquant::cuda
