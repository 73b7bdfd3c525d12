#include <algorithm>
#include <cstring>
#include <limits>
#include <map>
#include <mutex>
#include <set>
#include <stdexcept>
#include <tuple>
#include <utility>

#include "kernels/cuda/launch.h"

namespace pyquant::cuda {
namespace {

void check(cudaError_t error, const std::string& what) {
  if (error != cudaSuccess) throw std::runtime_error("pyquant: " + what + ": " + cudaGetErrorString(error));
}

}  // namespace

const Device& current_device() {
  static Device devices[kMaxDevices];
  static std::once_flag known[kMaxDevices];
  int index = 0;
  check(cudaGetDevice(&index), "cudaGetDevice");
  if (index >= kMaxDevices) throw std::runtime_error("pyquant: at most 64 CUDA devices are supported");
  std::call_once(known[index], [index] {
    int major = 0, minor = 0, sm_count = 0;
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index), "cudaDeviceGetAttribute");
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index), "cudaDeviceGetAttribute");
    check(cudaDeviceGetAttribute(&sm_count, cudaDevAttrMultiProcessorCount, index), "cudaDeviceGetAttribute");
    devices[index] = Device{index, 10 * major + minor, sm_count};
  });
  return devices[index];
}

void check_launch(const char* kernel, const std::string& problem) {
  check(cudaGetLastError(), std::string(kernel) + " " + problem);
}

bool has_sm_90_code(const void* kernel) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, bool> known;
  const std::pair<const void*, int> key(kernel, current_device().index);
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  cudaFuncAttributes attributes{};
  check(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
  return known[key] = attributes.ptxVersion >= 90;
}

bool has_sm_90a_code() { return current_device().arch == 90 && std::strstr(PYQUANT_CUDA_ARCHS, "90a") != nullptr; }

int resident_clusters(const void* kernel, const Launch& launch) {
  static std::mutex mutex;
  static std::map<std::tuple<const void*, int, unsigned>, int> known;
  const std::tuple<const void*, int, unsigned> key(kernel, current_device().index, launch.cluster);
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  int count = 0;
  if (launch.cluster > 1) {
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = launch.cluster;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = launch.cluster;
    config.blockDim = launch.block;
    config.dynamicSmemBytes = static_cast<size_t>(launch.shared_bytes);
    config.attrs = &cluster;
    config.numAttrs = 1;
    check(cudaOccupancyMaxActiveClusters(&count, kernel, &config), "cudaOccupancyMaxActiveClusters");
  } else {
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, static_cast<int>(launch.block.x),
                                                        static_cast<size_t>(launch.shared_bytes)),
          "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
    count *= current_device().sm_count;
  }
  return known[key] = std::max(count, 1);
}

void launch_kernel(const char* name, const std::string& problem, const Launch& launch, const void* kernel,
                   void** arguments) {
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config{};
  config.gridDim = launch.grid;
  config.blockDim = launch.block;
  config.dynamicSmemBytes = static_cast<size_t>(launch.shared_bytes);
  config.stream = launch.stream;
  config.attrs = attributes;
  if (launch.cluster > 1) {
    cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = launch.cluster;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  }
  if (launch.early && has_sm_90_code(kernel)) {
    cudaLaunchAttribute& early = attributes[config.numAttrs++];
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
  }
  const cudaError_t error = cudaLaunchKernelExC(&config, kernel, arguments);
  if (error != cudaSuccess) cudaGetLastError();  // not to be reported by the next check_launch as well
  check(error, std::string(name) + " " + problem);
}

void allow_shared_memory(const void* kernel, const char* name, int bytes) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;
  const std::pair<const void*, int> key(kernel, current_device().index);
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count(key) > 0) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
        std::string(name) + ": " + std::to_string(bytes) + " bytes of shared memory");
  allowed.insert(key);
}

unsigned grid_size(int64_t blocks, const char* kernel) {
  if (blocks > std::numeric_limits<int>::max()) {
    throw std::runtime_error("pyquant: " + std::string(kernel) + ": " + std::to_string(blocks) +
                             " thread blocks are more than one launch can have");
  }
  return static_cast<unsigned>(blocks);
}

}  // namespace pyquant::cuda
