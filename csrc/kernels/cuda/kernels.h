// The CUDA kernels' launchers. All pointers are device memory of the current device and contiguous, except where said;
// the callers have checked shapes, types and devices. Work goes to `stream`; nothing synchronises, allocates or changes
// the device. Launch failures are reported by throwing std::runtime_error.
#pragma once

#include <cuda_runtime_api.h>

#include "dispatch/linear_plan.h"
#include "format/philox.h"
#include "format/quantized_matrix.h"

namespace pyquant::cuda {

// A low-rank term of a linear: adds left[m, rank] · factor to the output. `factor` is lora_B [n, rank] in the forward
// (transposed in the product) and lora_A [rank, k] in dX. rank = 0: no term.
struct LowRank {
  const void* left;
  const void* factor;
  int64_t rank;
  // `left` comes from lora_down or lora_dya, without dropout and launched just before on the stream: the linear may run
  // at the same time, as plan_lora_linear says to both.
  bool left_beside;
  bool float_factor;  // the factor is float32 beside 16-bit activations: where linear_reads_float
  // What that launch returned: a word on the device, not 0 once all kernels before it have ended. Null where it lets
  // the linear start only then.
  const uint32_t* begun = nullptr;
};

// packed[ceil(numel / 2)], absmax[ceil(numel / blocksize)]. A block that holds a NaN or an infinity gets a non-finite
// absmax. The unused nibble of an odd count is the code of zero.
void quantize_4bit(DType dtype, const void* input, int64_t numel, QuantType type, int64_t blocksize, uint8_t* packed,
                   float* absmax, cudaStream_t stream);

// Double quantization's second pass: absmax - offset in 8 bits against `code` [256], blocks of kNestedBlocksize.
void quantize_absmax(const float* absmax, int64_t blocks, const float* offset, const float* code, uint8_t* absmax_codes,
                     float* nested_absmax, cudaStream_t stream);

// output[n, k] = the exact float32 products of code and absmax, each rounded once to dtype.
void dequantize_4bit(const QuantizedMatrix& weight, DType dtype, void* output, cudaStream_t stream);

// Of linear_4bit and linear_4bit_dx, by direction: the bytes of their workspace, 16-byte aligned, contents arbitrary;
// and whether they read a float32 factor beside 16-bit activations. `input` is x or dy.
int64_t linear_workspace(LinearDirection direction, const QuantizedMatrix& weight, DType dtype, int64_t m,
                         const void* input, const LowRank& lora);
bool linear_reads_float(LinearDirection direction, const QuantizedMatrix& weight, DType dtype, int64_t m,
                        const void* input, const LowRank& lora);
// The part of them that is to come before the launch of `left`, whose contents it does not need: where the plan wants
// the weight dequantized, writes that to `workspace` and returns true, which is then their `prepared`.
bool linear_prepare(LinearDirection direction, const QuantizedMatrix& weight, DType dtype, int64_t m, const void* input,
                    const LowRank& lora, void* workspace, cudaStream_t stream);

// y[m, n] = x[m, k] · Wᵀ + left[m, r] · factor[n, r]ᵀ + bias[n]. `bias` may be null.
void linear_4bit(const QuantizedMatrix& weight, DType dtype, int64_t m, const void* x, const void* bias,
                 const LowRank& lora, void* y, void* workspace, bool prepared, cudaStream_t stream);

// dx[m, k] = dy[m, n] · W + dropout(left[m, r] · factor[r, k]).
void linear_4bit_dx(const QuantizedMatrix& weight, DType dtype, int64_t m, const void* dy, const LowRank& lora,
                    const Dropout& dropout, void* dx, void* workspace, bool prepared, cudaStream_t stream);

// to[count], of a 16-bit dtype: `from` rounded to it. With a word (take_word), the kernel sets it to 1 once all kernels
// before have ended, and lets its successor start before that: one that waits for this one, as lora_down and lora_dya
// do.
void round_factor(DType dtype, const float* from, int64_t count, void* to, uint32_t* begun, cudaStream_t stream);

// A word for LowRank::begun, if that linear's plan runs beside its adapter's product; else null, or when none is left.
uint32_t* take_word(LinearDirection direction, const QuantizedMatrix& weight, DType dtype, int64_t m, int64_t rank,
                    cudaStream_t stream);

// xa[m, r] = scaling · dropout(x[m, k]) · a[r, k]ᵀ. The next launch on the stream is to be linear_4bit with that weight
// and adapter, which may run at the same time. Returns LowRank::begun. `float_a`: a is float32 beside 16-bit
// activations, where lora_down_reads_float. `begun`: what round_factor, launched just before, was given.
bool lora_down_reads_float(DType dtype, int64_t m, const Dropout& dropout);
const uint32_t* lora_down(const QuantizedMatrix& weight, DType dtype, int64_t m, int64_t rank, const void* x,
                          const void* a, bool float_a, float scaling, const Dropout& dropout, void* xa,
                          const uint32_t* begun, cudaStream_t stream);

// dya[m, r] = scaling · dy[m, n] · b[n, r]. `beside`: the next launch is linear_4bit_dx with that weight and adapter,
// without dropout. `begun` and what is returned: as lora_down's.
const uint32_t* lora_dya(const QuantizedMatrix& weight, DType dtype, int64_t m, int64_t rank, const void* dy,
                         const void* b, float scaling, bool beside, void* dya, const uint32_t* begun,
                         cudaStream_t stream);

// da[r, k] = dya[m, r]ᵀ · dropout(x[m, k]), in float32. Deterministic: partial sums over m go through `workspace`.
// db[n, r] = dy[m, n]ᵀ · xa[m, r], in float32, likewise. `columns` is k for da and n for db. lora_grad_b is to be
// launched just behind lora_grad_a, and may run at the same time.
int64_t lora_grad_workspace(DType dtype, int64_t m, int64_t columns, int64_t rank);
void lora_grad_a(DType dtype, int64_t m, int64_t k, int64_t rank, const void* dya, const void* x,
                 const Dropout& dropout, float* da, void* workspace, cudaStream_t stream);
void lora_grad_b(DType dtype, int64_t m, int64_t n, int64_t rank, const void* dy, const void* xa, float* db,
                 void* workspace, cudaStream_t stream);

}  // namespace pyquant::cuda
