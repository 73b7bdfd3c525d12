#include <cudaTypedefs.h>
#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

#include "kernels/cuda/launch.h"
#include "kernels/cuda/tensor_map.h"

namespace pyquant::cuda {
namespace {

// From the driver that the runtime has loaded: nothing is linked to libcuda, which machines without a GPU lack.
PFN_cuTensorMapEncodeTiled_v12000 encode_function() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result{};
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
  if (error != cudaSuccess || result != cudaDriverEntryPointSuccess || function == nullptr) {
    throw std::runtime_error(
        "pyquant: this NVIDIA driver has no cuTensorMapEncodeTiled, which kernels for Hopper need; install a driver "
        "for CUDA 12.0 or later");
  }
  return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
}

}  // namespace

CUtensorMap make_tensor_map(const void* base, CUtensorMapDataType type, int64_t rows, int64_t columns, int64_t pitch,
                            int box_rows, int box_columns, CUtensorMapSwizzle swizzle) {
  static const PFN_cuTensorMapEncodeTiled_v12000 encode = encode_function();
  CUtensorMap map;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t pitches[1] = {static_cast<cuuint64_t>(pitch)};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  const auto fill = [&] {
    return encode(&map, type, 2, const_cast<void*>(base), sizes, pitches, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                  swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  };
  CUresult result = fill();
  if (result == CUDA_ERROR_INVALID_CONTEXT) {
    // A thread that has launched nothing yet, autograd's for example, has a current device but no current context,
    // which the driver wants and the runtime makes.
    cudaSetDevice(current_device().index);
    result = fill();
  }
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("pyquant: cuTensorMapEncodeTiled refused a [" + std::to_string(rows) + ", " +
                             std::to_string(columns) + "] matrix with rows " + std::to_string(pitch) +
                             " bytes apart: CUresult " + std::to_string(static_cast<int>(result)));
  }
  return map;
}

}  // namespace pyquant::cuda
