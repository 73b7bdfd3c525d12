// A linear of few rows reads each weight once and is bound by decoding: no packing, every output row keeps its own dot
// products in registers.
#pragma once

#include "kernels/cpu/kernels.h"

namespace pyquant::cpu {

// linear_4bit, where this is the faster way; false, and nothing is done, where it is not.
bool multiply_few_rows(const QuantizedMatrix& weight, DType dtype, int64_t m, const void* x, const void* bias,
                       const LowRank& lora, void* y);

// The operands of a call, x and left as floats. Where every row begins at a multiple of 32 elements (`aligned`), no
// block begins or ends inside 32 of them, and each 32 elements of x are in the order in which the kernel decodes a
// weight's.
struct FewRows {
  const QuantizedMatrix* weight;
  DType dtype;
  int64_t m;  // at most kMaxFewRows
  bool aligned;
  const float* x;      // [m, k]
  const float* left;   // [m, rank]
  const void* factor;  // [n, rank] of dtype
  int64_t rank;
  const void* bias;
  float* y;  // [m, n]
};

constexpr int64_t kMaxFewRows = 8;

struct FewRowsKernel {
  void (*order)(DType dtype, const void* from, int64_t offset, int64_t count, float* to);  // count % 32 == 0
  void (*load)(DType dtype, const void* from, int64_t offset, int64_t count, float* to);
  void (*compute)(const FewRows& problem, int64_t row_begin, int64_t row_end);
  void (*store)(DType dtype, const float* from, int64_t count, void* to, int64_t offset);
};

extern const FewRowsKernel kFewRowsPortable;
#if PYQUANT_X86
extern const FewRowsKernel kFewRowsAvx2;
extern const FewRowsKernel kFewRowsAvx512;
#endif

}  // namespace pyquant::cpu
