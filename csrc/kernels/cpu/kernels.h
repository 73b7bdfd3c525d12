// The CPU kernels. All pointers are host memory and contiguous; the callers have checked shapes, types and devices.
// Every function picks the widest instruction set that this processor runs (isa.h) and works on torch's thread pool.
#pragma once

#include "format/philox.h"
#include "format/quantized_matrix.h"

namespace pyquant::cpu {

// A low-rank term of a linear: adds left[m, rank] · factor to the output. `factor` is lora_B [n, rank] in the forward
// (transposed in the product) and lora_A [rank, k] in dX. rank = 0: no term.
struct LowRank {
  const void* left;
  const void* factor;
  int64_t rank;
};

// packed[ceil(numel / 2)], absmax[ceil(numel / blocksize)]. A block that holds a NaN or an infinity gets a non-finite
// absmax. The unused nibble of an odd count is the code of zero.
void quantize_4bit(DType dtype, const void* input, int64_t numel, QuantType type, int64_t blocksize, uint8_t* packed,
                   float* absmax);

// Double quantization's second pass: absmax - offset in 8 bits against `code` [256], blocks of kNestedBlocksize.
void quantize_absmax(const float* absmax, int64_t blocks, const float* offset, const float* code, uint8_t* absmax_codes,
                     float* nested_absmax);

// output[n, k] = the exact float32 products of code and absmax, each rounded once to dtype.
void dequantize_4bit(const QuantizedMatrix& weight, DType dtype, void* output);

// y[m, n] = x[m, k] · Wᵀ + left[m, r] · factor[n, r]ᵀ + bias[n]. `bias` may be null.
void linear_4bit(const QuantizedMatrix& weight, DType dtype, int64_t m, const void* x, const void* bias,
                 const LowRank& lora, void* y);

// dx[m, k] = dy[m, n] · W + dropout(left[m, r] · factor[r, k]).
void linear_4bit_dx(const QuantizedMatrix& weight, DType dtype, int64_t m, const void* dy, const LowRank& lora,
                    const Dropout& dropout, void* dx);

// xa[m, r] = scaling · dropout(x[m, k]) · a[r, k]ᵀ.
void lora_down(DType dtype, int64_t m, int64_t k, int64_t rank, const void* x, const void* a, float scaling,
               const Dropout& dropout, void* xa);

// dya[m, r] = scaling · dy[m, n] · b[n, r].
void lora_dya(DType dtype, int64_t m, int64_t n, int64_t rank, const void* dy, const void* b, float scaling, void* dya);

// da[r, k] = dya[m, r]ᵀ · dropout(x[m, k]), in float32.
void lora_grad_a(DType dtype, int64_t m, int64_t k, int64_t rank, const void* dya, const void* x,
                 const Dropout& dropout, float* da);

// db[n, r] = dy[m, n]ᵀ · xa[m, r], in float32.
void lora_grad_b(DType dtype, int64_t m, int64_t n, int64_t rank, const void* dy, const void* xa, float* db);

}  // namespace pyquant::cpu
