// Decodes elements [begin, end) of the flattened matrix into output[begin, end).
#pragma once

#include "format/quantized_matrix.h"

namespace pyquant::cpu {

using DequantizeRange = void (*)(const QuantizedMatrix& weight, DType dtype, int64_t begin, int64_t end, void* output);

void dequantize_range_avx2(const QuantizedMatrix& weight, DType dtype, int64_t begin, int64_t end, void* output);
void dequantize_range_avx512(const QuantizedMatrix& weight, DType dtype, int64_t begin, int64_t end, void* output);

}  // namespace pyquant::cpu
