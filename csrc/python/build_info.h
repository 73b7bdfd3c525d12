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

}  // namespace pyquant
