#include "python/build_info.h"

#include <stdexcept>
#include <utility>

#include "dispatch/linear_plan.h"
#include "kernels/cpu/isa.h"

#if PYQUANT_CUDA
#include <cuda_runtime_api.h>
#endif

namespace pyquant {

std::string version() { return PYQUANT_VERSION; }

std::string cpu_isa() { return cpu::isa_name(); }

void set_cpu_isa(const std::string& name) {
  const std::pair<const char*, cpu::Isa> names[] = {{"portable", cpu::Isa::kPortable},
                                                    {"avx2", cpu::Isa::kAvx2},
                                                    {"avx512", cpu::Isa::kAvx512},
                                                    {"amx", cpu::Isa::kAmx}};
  for (const auto& [known, isa] : names) {
    if (name != known) continue;
    if (!cpu::set_isa(isa)) throw std::invalid_argument("this processor does not run '" + name + "'");
    return;
  }
  throw std::invalid_argument("'" + name + "' is not one of portable, avx2, avx512 and amx");
}

std::string explain_plan(int64_t m, int64_t n, int64_t k, const std::string& dtype, int64_t rank, bool dropout,
                         int64_t blocksize, const std::string& direction, int arch, int sm_count) {
  LinearProblem problem{};
  if (direction == "forward") {
    problem.direction = LinearDirection::kForward;
  } else if (direction == "dx") {
    problem.direction = LinearDirection::kDx;
  } else {
    throw std::invalid_argument("direction must be 'forward' or 'dx', got '" + direction + "'");
  }
  if (dtype == "float32") {
    problem.dtype = DType::kFloat32;
  } else if (dtype == "float16") {
    problem.dtype = DType::kFloat16;
  } else if (dtype == "bfloat16") {
    problem.dtype = DType::kBFloat16;
  } else {
    throw std::invalid_argument("dtype must be float32, float16 or bfloat16, got '" + dtype + "'");
  }
  if (m < 0 || n < 1 || k < 1 || rank < 0) throw std::invalid_argument("m and rank must be >= 0, n and k >= 1");
  if (sm_count < 1) throw std::invalid_argument("sm_count must be >= 1, got " + std::to_string(sm_count));
  problem.m = m;
  problem.n = n;
  problem.k = k;
  problem.rank = rank;
  problem.left_beside = rank > 0 && !dropout;
  problem.blocksize = blocksize;
  problem.arch = arch;
  problem.sm_90a = arch == 90;
  problem.sm_count = sm_count;
  problem.aligned = true;
  return describe(problem, plan_linear(problem));
}

#if PYQUANT_CUDA
std::string cuda_version() { return PYQUANT_CUDA_VERSION; }
std::string cuda_archs() { return PYQUANT_CUDA_ARCHS; }

std::vector<DeviceInfo> cuda_devices() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) return {};
  std::vector<DeviceInfo> devices;
  for (int device = 0; device < count; ++device) {
    cudaDeviceProp properties;
    if (cudaGetDeviceProperties(&properties, device) != cudaSuccess) continue;
    devices.push_back({properties.name, properties.major, properties.minor, properties.multiProcessorCount,
                       static_cast<int64_t>(properties.totalGlobalMem), properties.l2CacheSize,
                       static_cast<int64_t>(properties.sharedMemPerBlockOptin)});
  }
  return devices;
}
#else
std::string cuda_version() { return ""; }
std::string cuda_archs() { return ""; }
std::vector<DeviceInfo> cuda_devices() { return {}; }
#endif

}  // namespace pyquant
