// linear_4bit and linear_4bit_dx: describe the problem, take the plan, launch its kernel.
#include <algorithm>

#include "dispatch/linear_plan.h"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/linear_kernels.h"

namespace pyquant::cuda {
namespace {

LinearProblem problem_of(LinearDirection direction, const QuantizedMatrix& weight, DType dtype, int64_t m, int64_t rank,
                         bool left_beside, bool aligned) {
  const Device& device = current_device();
  LinearProblem problem{};
  problem.direction = direction;
  problem.m = m;
  problem.n = weight.n;
  problem.k = weight.k;
  problem.dtype = dtype;
  problem.rank = rank;
  problem.left_beside = left_beside;
  problem.blocksize = weight.blocksize;
  problem.arch = device.arch;
  problem.sm_90a = has_sm_90a_code();
  problem.sm_count = device.sm_count;
  problem.aligned = aligned;
  return problem;
}

LinearProblem problem_of(LinearDirection direction, const QuantizedMatrix& weight, DType dtype, int64_t m,
                         const void* input, const LowRank& lora) {
  const bool aligned =
      aligned_16(input) && aligned_16(weight.packed) && aligned_16(lora.left) && aligned_16(lora.factor);
  return problem_of(direction, weight, dtype, m, lora.rank, lora.left_beside, aligned);
}

void run(LinearDirection direction, const LinearArguments& arguments, cudaStream_t stream) {
  const QuantizedMatrix& matrix = arguments.weight.matrix;
  if (arguments.m <= 0 || matrix.numel() <= 0) return;
  const LinearProblem problem =
      problem_of(direction, matrix, arguments.dtype, arguments.m, arguments.input, arguments.lora);
  LinearPlan plan = plan_linear(problem);
  if (plan.kernel == LinearKernel::kDense && !arguments.prepared) {
    // The factor was not aligned when linear_prepare saw it, and has been copied since.
    dequantize_4bit(matrix, arguments.dtype, arguments.workspace, stream);
    plan.beside = 0;
  }
  log_plan(problem, plan);
  switch (plan.kernel) {
    case LinearKernel::kStream:
      return linear_stream(arguments, plan, stream);
    case LinearKernel::kFewRows:
      return linear_few_rows(arguments, plan, stream);
    case LinearKernel::kSmallM:
      return linear_small_m(arguments, plan, stream);
    case LinearKernel::kWgmma:
    case LinearKernel::kDense:
      return linear_wgmma(arguments, direction, plan, stream);
    case LinearKernel::kMma:
      return linear_mma(arguments, direction, plan, stream);
    case LinearKernel::kSimt:
      return linear_simt(arguments, direction, stream);
  }
}

}  // namespace

LinearPlan plan_lora_linear(LinearDirection direction, const QuantizedMatrix& weight, DType dtype, int64_t m,
                            int64_t rank) {
  return plan_linear(problem_of(direction, weight, dtype, m, rank, true, true));
}

// Where nothing but the adapter's factor is not aligned, the caller may pass an aligned copy later: enough for either
// plan.
int64_t linear_workspace(LinearDirection direction, const QuantizedMatrix& weight, DType dtype, int64_t m,
                         const void* input, const LowRank& lora) {
  if (m <= 0 || weight.numel() <= 0) return 0;
  LinearProblem problem = problem_of(direction, weight, dtype, m, input, lora);
  int64_t bytes = plan_linear(problem).workspace(problem);
  if (!problem.aligned && lora.rank > 0 && aligned_16(input) && aligned_16(weight.packed) && aligned_16(lora.left)) {
    problem.aligned = true;
    bytes = std::max(bytes, plan_linear(problem).workspace(problem));
  }
  return bytes;
}

bool linear_reads_float(LinearDirection direction, const QuantizedMatrix& weight, DType dtype, int64_t m,
                        const void* input, const LowRank& lora) {
  if (m <= 0 || lora.rank <= 0) return false;
  const LinearKernel kernel = plan_linear(problem_of(direction, weight, dtype, m, input, lora)).kernel;
  return kernel == LinearKernel::kStream || kernel == LinearKernel::kWgmma || kernel == LinearKernel::kDense;
}

bool linear_prepare(LinearDirection direction, const QuantizedMatrix& weight, DType dtype, int64_t m, const void* input,
                    const LowRank& lora, void* workspace, cudaStream_t stream) {
  if (workspace == nullptr) return false;  // no plan of kDense is without
  const LinearPlan plan = plan_linear(problem_of(direction, weight, dtype, m, input, lora));
  if (plan.kernel != LinearKernel::kDense) return false;
  dequantize_4bit(weight, dtype, workspace, stream);
  return true;
}

void linear_4bit(const QuantizedMatrix& weight, DType dtype, int64_t m, const void* x, const void* bias,
                 const LowRank& lora, void* y, void* workspace, bool prepared, cudaStream_t stream) {
  const Dropout no_dropout{nullptr, 0, 1.0f};
  run(LinearDirection::kForward, {make_weight(weight), dtype, m, x, bias, lora, no_dropout, y, workspace, prepared},
      stream);
}

void linear_4bit_dx(const QuantizedMatrix& weight, DType dtype, int64_t m, const void* dy, const LowRank& lora,
                    const Dropout& dropout, void* dx, void* workspace, bool prepared, cudaStream_t stream) {
  run(LinearDirection::kDx, {make_weight(weight), dtype, m, dy, nullptr, lora, dropout, dx, workspace, prepared},
      stream);
}

}  // namespace pyquant::cuda
