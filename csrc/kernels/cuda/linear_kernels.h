// The kernels behind linear_4bit and linear_4bit_dx, one launcher each; linear.cu chooses.
#pragma once

#include "dispatch/linear_plan.h"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/weight.h"

namespace pyquant::cuda {

// output[m, columns] = input[m, reduction] · (Wᵀ or W) + dropout(low-rank term) + bias. Forward has no dropout, dX no
// bias.
struct LinearArguments {
  Weight weight;
  DType dtype;
  int64_t m;
  const void* input;
  const void* bias;
  LowRank lora;
  Dropout dropout;
  void* output;
  void* workspace;
  bool prepared;  // linear_prepare
};

// What linear_4bit or linear_4bit_dx will choose for an aligned input and adapter and LowRank::left_beside. Where that
// turns out otherwise, both kernels are right all the same, and slower.
LinearPlan plan_lora_linear(LinearDirection direction, const QuantizedMatrix& weight, DType dtype, int64_t m,
                            int64_t rank);

void linear_stream(const LinearArguments& arguments, const LinearPlan& plan, cudaStream_t stream);
void linear_few_rows(const LinearArguments& arguments, const LinearPlan& plan, cudaStream_t stream);
void linear_small_m(const LinearArguments& arguments, const LinearPlan& plan, cudaStream_t stream);
void linear_wgmma(const LinearArguments& arguments, LinearDirection direction, const LinearPlan& plan,
                  cudaStream_t stream);
void linear_mma(const LinearArguments& arguments, LinearDirection direction, const LinearPlan& plan,
                cudaStream_t stream);
void linear_simt(const LinearArguments& arguments, LinearDirection direction, cudaStream_t stream);

}  // namespace pyquant::cuda
