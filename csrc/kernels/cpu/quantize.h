// Quantizes whole blocks [begin, end) of `blocksize` elements each; the partial last block is quantize.cpp's own.
#pragma once

#include "format/quantized_matrix.h"

namespace pyquant::cpu {

using QuantizeBlocks = void (*)(DType dtype, const void* input, int64_t begin, int64_t end, QuantType type,
                                int64_t blocksize, uint8_t* packed, float* absmax);

void quantize_blocks_avx2(DType dtype, const void* input, int64_t begin, int64_t end, QuantType type, int64_t blocksize,
                          uint8_t* packed, float* absmax);
void quantize_blocks_avx512(DType dtype, const void* input, int64_t begin, int64_t end, QuantType type,
                            int64_t blocksize, uint8_t* packed, float* absmax);

}  // namespace pyquant::cpu
