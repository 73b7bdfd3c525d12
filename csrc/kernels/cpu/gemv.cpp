#include "kernels/cpu/gemv.h"

#include <algorithm>

#include "kernels/cpu/isa.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/scalar.h"
#include "kernels/cpu/scratch.h"

namespace pyquant::cpu {
namespace {

enum Slot { kSlotX, kSlotLeft, kSlotY };

// Above this many rows packing panels pays: early where the products then cost next to nothing, late where a weight's
// rows are slow to pack. In float32 the limit is accuracy's: dense products of up to 16 rows keep many partial sums, as
// this way does, and a panel's one sum for each output would not stay within the error bound.
int64_t row_limit(DType dtype, bool aligned) {
  if (!aligned || dtype == DType::kFloat32) return 2 * kMaxFewRows;
  return dtype == DType::kBFloat16 && isa() >= Isa::kAmx ? 6 : kMaxFewRows;
}

const FewRowsKernel& kernel_for_isa() {
#if PYQUANT_X86
  if (isa() >= Isa::kAvx512) return kFewRowsAvx512;
  if (isa() >= Isa::kAvx2) return kFewRowsAvx2;
#endif
  return kFewRowsPortable;
}

// kMaxFewRows rows of x at most.
void multiply_chunk(const FewRowsKernel& kernel, FewRows problem, const void* x, const LowRank& lora, int64_t first_row,
                    void* y) {
  const QuantizedMatrix& weight = *problem.weight;
  const int64_t m = problem.m, n = weight.n, k = weight.k;
  float* ordered = static_cast<float*>(scratch(kSlotX, m * k * sizeof(float)));
  const auto load = problem.aligned ? kernel.order : kernel.load;
  load(problem.dtype, x, first_row * k, m * k, ordered);
  problem.x = ordered;
  if (problem.rank > 0) {
    float* left = static_cast<float*>(scratch(kSlotLeft, m * problem.rank * sizeof(float)));
    kernel.load(problem.dtype, lora.left, first_row * problem.rank, m * problem.rank, left);
    problem.left = left;
  }
  problem.y = problem.dtype == DType::kFloat32 ? static_cast<float*>(y) + first_row * n
                                               : static_cast<float*>(scratch(kSlotY, m * n * sizeof(float)));
  constexpr int64_t kGroup = 8;  // rows of the weight
  const int64_t grain = std::max<int64_t>(1, (1 << 15) / (kGroup * std::max<int64_t>(k, 1)));
  parallel_for(divide_up(n, kGroup), grain,
               [&](int64_t begin, int64_t end) { kernel.compute(problem, begin * kGroup, std::min(n, end * kGroup)); });
  if (problem.dtype != DType::kFloat32) kernel.store(problem.dtype, problem.y, m * n, y, first_row * n);
}

}  // namespace

bool multiply_few_rows(const QuantizedMatrix& weight, DType dtype, int64_t m, const void* x, const void* bias,
                       const LowRank& lora, void* y) {
  const bool aligned = weight.k % 32 == 0;
  if (m > row_limit(dtype, aligned)) return false;
  const FewRowsKernel& kernel = kernel_for_isa();
  FewRows problem{};
  problem.weight = &weight;
  problem.dtype = dtype;
  problem.aligned = aligned;
  problem.factor = lora.factor;
  problem.rank = lora.rank;
  problem.bias = bias;
  for (int64_t first = 0; first < m; first += kMaxFewRows) {
    problem.m = std::min(kMaxFewRows, m - first);
    multiply_chunk(kernel, problem, x, lora, first, y);
  }
  return true;
}

}  // namespace pyquant::cpu
