// The body of DequantizeRange, for the instruction set of the including file.
#pragma once

#include "kernels/cpu/decode.h"
#include "kernels/cpu/dequantize.h"

namespace pyquant::cpu {
namespace {

inline void dequantize_range(const QuantizedMatrix& weight, DType dtype, int64_t begin, int64_t end, void* output) {
  if (dtype == DType::kFloat32) {
    decode(weight, begin, end - begin, static_cast<float*>(output) + begin);
  } else if (dtype == DType::kBFloat16) {
    decode(weight, begin, end - begin, static_cast<BFloat16*>(output) + begin);
  } else {
    decode(weight, begin, end - begin, static_cast<Half*>(output) + begin);
  }
}

}  // namespace
}  // namespace pyquant::cpu
