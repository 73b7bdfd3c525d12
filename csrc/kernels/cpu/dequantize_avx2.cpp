#include "kernels/cpu/dequantize_range.h"

namespace pyquant::cpu {

void dequantize_range_avx2(const QuantizedMatrix& weight, DType dtype, int64_t begin, int64_t end, void* output) {
  dequantize_range(weight, dtype, begin, end, output);
}

}  // namespace pyquant::cpu
