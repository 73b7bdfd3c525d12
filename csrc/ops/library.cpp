// The namespace torch.ops.pyquant. Each op's file adds its schema and its implementations; loading the library also
// hands torch's thread pool to the CPU kernels.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "kernels/cpu/parallel.h"

STABLE_TORCH_LIBRARY(pyquant, library) {
  pyquant::cpu::set_parallel_for(
      [](int64_t begin, int64_t end, int64_t grain, pyquant::cpu::ParallelBody body, void* context) {
        STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, body, context));
      },
      [] { return static_cast<int>(torch::stable::get_num_threads()); });
}
