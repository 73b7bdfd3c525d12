// Quantization to 4 bits, and double quantization's 8-bit pass. Both give bitsandbytes' CPU bytes.
#include "format/codebook.h"
#include "kernels/cuda/element.h"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/launch.h"

namespace pyquant::cuda {
namespace {

// A block of threads takes 4096 consecutive elements, which is a whole number of quantization blocks of any size, and a
// thread 8 of them: 16 bytes in of a 16-bit type, 4 bytes out.
constexpr int kThreads = 512;
constexpr int kElements = 8;
constexpr int64_t kTile = kThreads * kElements;
static_assert(kTile == 4096, "the largest blocksize");

struct Quantizer {
  float threshold[15];
  uint32_t order[16];
  int blocksize_log2;
};

template <typename T>
__device__ void load_elements(const T* input, bool vector, int64_t begin, int64_t numel, float (&value)[kElements]) {
  if (vector && begin + kElements <= numel) {
    if constexpr (sizeof(T) == 4) {
      const float4 low = __ldg(reinterpret_cast<const float4*>(input + begin));
      const float4 high = __ldg(reinterpret_cast<const float4*>(input + begin) + 1);
      value[0] = low.x, value[1] = low.y, value[2] = low.z, value[3] = low.w;
      value[4] = high.x, value[5] = high.y, value[6] = high.z, value[7] = high.w;
    } else {
      const uint4 words = __ldg(reinterpret_cast<const uint4*>(input + begin));
      const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 pair = unpack_pair<T>(word[i]);
        value[2 * i] = pair.x, value[2 * i + 1] = pair.y;
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < kElements; ++i) value[i] = begin + i < numel ? to_float(input[begin + i]) : 0.0f;
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    quantize_4bit_kernel(const __grid_constant__ Quantizer quantizer, const T* __restrict__ input, int64_t numel,
                         bool vector_in, bool vector_out, uint8_t* __restrict__ packed, float* __restrict__ absmax) {
  __shared__ float threshold[15];
  __shared__ uint32_t order[16];
  __shared__ uint32_t warp_absmax[kThreads / 32];
  if (threadIdx.x < 15) threshold[threadIdx.x] = quantizer.threshold[threadIdx.x];
  if (threadIdx.x < 16) order[threadIdx.x] = quantizer.order[threadIdx.x];
  __syncthreads();

  const int64_t blocksize = int64_t{1} << quantizer.blocksize_log2;
  const int lanes = 1 << (quantizer.blocksize_log2 - 3);  // threads that share a quantization block
  for (int64_t tile = int64_t{blockIdx.x} * kTile; tile < numel; tile += int64_t{gridDim.x} * kTile) {
    const int64_t begin = tile + int64_t{threadIdx.x} * kElements;
    float value[kElements];
    load_elements(input, vector_in, begin, numel, value);

    // Magnitudes compare like their bits, and a NaN's bits are above infinity's: the maximum keeps it.
    uint32_t largest = 0;
#pragma unroll
    for (int i = 0; i < kElements; ++i) largest = max(largest, __float_as_uint(value[i]) & 0x7FFFFFFFu);
#pragma unroll
    for (int distance = 16; distance > 0; distance >>= 1) {
      if (distance < lanes) largest = max(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, distance));
    }
    if (lanes > 32) {  // the quantization block spans lanes / 32 warps
      const int warp = threadIdx.x / 32, warps = lanes / 32;
      if (threadIdx.x % 32 == 0) warp_absmax[warp] = largest;
      __syncthreads();
      const int first = warp & ~(warps - 1);
      for (int i = 0; i < warps; ++i) largest = max(largest, warp_absmax[first + i]);
      __syncthreads();  // before the next tile overwrites warp_absmax
    }

    if (begin < numel) {
      const float true_absmax = __uint_as_float(largest);
      const float guarded = fmaxf(true_absmax, kMinAbsmax);
      const int64_t block = begin >> quantizer.blocksize_log2;
      const bool full = (block + 1) * blocksize <= numel;
      if ((begin & (blocksize - 1)) == 0) {
        // A partial block stores the guarded absmax, unless it is NaN, which fmaxf drops and the caller looks for.
        absmax[block] = full || largest > 0x7F800000u ? true_absmax : guarded;
      }
      const float reciprocal = __frcp_rn(guarded);

      uint32_t word = 0;
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        // Full blocks multiply by the reciprocal, a partial one divides: so do the bytes that checkpoints hold.
        float normalised = full ? __fmul_rn(value[i], reciprocal) : __fdiv_rn(value[i], guarded);
        normalised = fminf(fmaxf(normalised, -1.0f), 1.0f);
        // The number of thresholds below the value, by bisection: the table of 15 is conflict-free in shared memory.
        int below = normalised > threshold[7] ? 8 : 0;
        below += normalised > threshold[below + 3] ? 4 : 0;
        below += normalised > threshold[below + 1] ? 2 : 0;
        below += normalised > threshold[below] ? 1 : 0;
        word |= order[below] << (8 * (i / 2) + (i % 2 == 0 ? 4 : 0));
      }
      if (vector_out && begin + kElements <= numel) {
        *reinterpret_cast<uint32_t*>(packed + begin / 2) = word;
      } else {
#pragma unroll
        for (int i = 0; i < kElements / 2; ++i) {
          if (begin + 2 * i < numel) packed[begin / 2 + i] = static_cast<uint8_t>(word >> (8 * i));
        }
      }
    }
  }
}

// 8-bit quantization as bitsandbytes' CPU backend does it: the normalised value is first rounded to one of 65536 equal
// steps of [-1, 1], and the step then gets the nearest code, the lower one of two as near.
__global__ void __launch_bounds__(kNestedBlocksize)
    quantize_absmax_kernel(const float* __restrict__ absmax, int64_t blocks, const float* __restrict__ offset,
                           const float* __restrict__ code, uint8_t* __restrict__ absmax_codes,
                           float* __restrict__ nested_absmax) {
  __shared__ float midpoint[255];
  __shared__ uint32_t warp_absmax[kNestedBlocksize / 32];
  const int thread = threadIdx.x;
  if (thread < 255) midpoint[thread] = __fmul_rn(0.5f, __fadd_rn(code[thread], code[thread + 1]));

  const int64_t index = int64_t{blockIdx.x} * kNestedBlocksize + thread;
  const float value = index < blocks ? __fsub_rn(absmax[index], *offset) : 0.0f;
  uint32_t largest = __float_as_uint(value) & 0x7FFFFFFFu;
#pragma unroll
  for (int distance = 16; distance > 0; distance >>= 1) {
    largest = max(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, distance));
  }
  if (thread % 32 == 0) warp_absmax[thread / 32] = largest;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kNestedBlocksize / 32; ++i) largest = max(largest, warp_absmax[i]);

  const float scale = __uint_as_float(largest);
  if (thread == 0) nested_absmax[blockIdx.x] = scale;
  if (index >= blocks) return;
  if (scale == 0.0f) {
    absmax_codes[index] = 0;
    return;
  }
  const float normalised = fminf(fmaxf(__fmul_rn(value, __frcp_rn(scale)), -1.0f), 1.0f);
  const float step = truncf(__fadd_rn(__fmul_rn(__fmul_rn(__fadd_rn(normalised, 1.0f), 0.5f), 65535.0f), 0.5f));
  const float rounded = __fadd_rn(-1.0f, __fdiv_rn(__fmul_rn(2.0f, step), 65535.0f));
  int below = 0;
#pragma unroll
  for (int half = 128; half > 0; half >>= 1) {
    if (midpoint[below + half - 1] < rounded) below += half;
  }
  absmax_codes[index] = static_cast<uint8_t>(below);
}

}  // namespace

void quantize_4bit(DType dtype, const void* input, int64_t numel, QuantType type, int64_t blocksize, uint8_t* packed,
                   float* absmax, cudaStream_t stream) {
  if (numel <= 0) return;
  Quantizer quantizer{};
  for (int i = 0; i < 15; ++i) {
    quantizer.threshold[i] = (type == QuantType::kNF4 ? kNF4Thresholds : kFP4Thresholds).value[i];
  }
  for (int i = 0; i < 16; ++i) quantizer.order[i] = type == QuantType::kNF4 ? kNF4Order[i] : kFP4Order[i];
  while ((int64_t{1} << quantizer.blocksize_log2) < blocksize) ++quantizer.blocksize_log2;

  const int64_t tiles = ceil_div(numel, kTile);
  const unsigned grid = static_cast<unsigned>(tiles < (int64_t{1} << 30) ? tiles : (int64_t{1} << 30));
  const bool vector_in = aligned_16(input);
  const bool vector_out = reinterpret_cast<uintptr_t>(packed) % 4 == 0;
  with_element_type(dtype, [&](auto element) {
    using T = decltype(element);
    quantize_4bit_kernel<T><<<grid, kThreads, 0, stream>>>(quantizer, static_cast<const T*>(input), numel, vector_in,
                                                           vector_out, packed, absmax);
  });
  check_launch("quantize_4bit", "of " + std::to_string(numel) + " elements in blocks of " + std::to_string(blocksize));
}

void quantize_absmax(const float* absmax, int64_t blocks, const float* offset, const float* code, uint8_t* absmax_codes,
                     float* nested_absmax, cudaStream_t stream) {
  if (blocks <= 0) return;
  const unsigned grid = grid_size(ceil_div(blocks, kNestedBlocksize), "quantize_absmax");
  quantize_absmax_kernel<<<grid, kNestedBlocksize, 0, stream>>>(absmax, blocks, offset, code, absmax_codes,
                                                                nested_absmax);
  check_launch("quantize_absmax", "of " + std::to_string(blocks) + " values");
}

}  // namespace pyquant::cuda
