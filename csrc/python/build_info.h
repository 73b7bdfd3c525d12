// What the op library tells the Python module about itself.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#define PYQUANT_EXPORT __attribute__((visibility("default")))

namespace pyquant {

struct DeviceInfo {
  std::string name;
  int major, minor;
  int multiprocessors;
  int64_t memory_bytes, l2_bytes, shared_memory_per_block;
};

PYQUANT_EXPORT std::string version();
PYQUANT_EXPORT std::string cpu_isa();
PYQUANT_EXPORT void set_cpu_isa(const std::string& name);  // throws std::invalid_argument
PYQUANT_EXPORT std::string cuda_version();                 // empty without CUDA
PYQUANT_EXPORT std::string cuda_archs();                   // empty without CUDA
PYQUANT_EXPORT std::vector<DeviceInfo> cuda_devices();     // empty without CUDA or without a driver

// The plan for a 4-bit linear on a GPU, in one line. dtype: "float32", "float16" or "bfloat16"; direction: "forward" or
// "dx". Throws std::invalid_argument for anything else.
PYQUANT_EXPORT std::string explain_plan(int64_t m, int64_t n, int64_t k, const std::string& dtype, int64_t rank,
                                        bool dropout, int64_t blocksize, const std::string& direction, int arch,
                                        int sm_count);

}  // namespace pyquant
