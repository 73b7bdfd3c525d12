// The whole matrix back to an element type, in one launch.
#include "kernels/cuda/element.h"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/weight.h"

namespace pyquant::cuda {
namespace {

// A thread turns 4 packed bytes into 8 elements: 128 bytes a warp in, 512 out (16-bit types), each contiguous. Four
// such words a thread are loaded before the first is used, to have enough bytes in flight.
constexpr int kThreads = 256;
constexpr int kElements = 8;
constexpr int kWords = 4;
constexpr int64_t kTile = int64_t{kThreads} * kElements * kWords;

template <typename T>
__device__ void store_elements(T* output, const float (&value)[kElements]) {
  if constexpr (sizeof(T) == 4) {
    reinterpret_cast<float4*>(output)[0] = make_float4(value[0], value[1], value[2], value[3]);
    reinterpret_cast<float4*>(output)[1] = make_float4(value[4], value[5], value[6], value[7]);
  } else {
    *reinterpret_cast<uint4*>(output) = make_uint4(pack_pair<T>(value[0], value[1]), pack_pair<T>(value[2], value[3]),
                                                   pack_pair<T>(value[4], value[5]), pack_pair<T>(value[6], value[7]));
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    dequantize_4bit_kernel(const __grid_constant__ Weight weight, bool vector, T* __restrict__ output) {
  __shared__ DecodeTables tables;
  load_tables(tables, weight);
  const float offset = load_offset(weight);
  const int64_t numel = weight.matrix.numel();
  __syncthreads();

  for (int64_t tile = int64_t{blockIdx.x} * kTile; tile < numel; tile += int64_t{gridDim.x} * kTile) {
    const int64_t first = tile + int64_t{threadIdx.x} * kElements;
    uint32_t word[kWords];
    AbsmaxLoad absmax[kWords];
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const int64_t begin = first + int64_t{i} * kThreads * kElements;
      word[i] = 0;
      absmax[i] = AbsmaxLoad{0, 0.0f};
      if (begin >= numel) continue;
      if (vector && begin + kElements <= numel) {
        word[i] = __ldg(reinterpret_cast<const uint32_t*>(weight.matrix.packed + begin / 2));
      } else {
#pragma unroll
        for (int byte = 0; byte < 4; ++byte) {
          if (begin + 2 * byte < numel) {
            word[i] |= static_cast<uint32_t>(__ldg(weight.matrix.packed + begin / 2 + byte)) << (8 * byte);
          }
        }
      }
      absmax[i] = load_absmax(weight, begin >> weight.blocksize_log2);
    }
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const int64_t begin = first + int64_t{i} * kThreads * kElements;
      if (begin >= numel) continue;
      const float scale = finish_absmax(tables, weight, absmax[i], offset);
      float value[kElements];
      decode_word(tables, word[i], value);
#pragma unroll
      for (int j = 0; j < kElements; ++j) value[j] = __fmul_rn(value[j], scale);
      if (vector && begin + kElements <= numel) {
        store_elements(output + begin, value);
      } else {
#pragma unroll
        for (int j = 0; j < kElements; ++j) {
          if (begin + j < numel) output[begin + j] = from_float<T>(value[j]);
        }
      }
    }
  }
}

}  // namespace

void dequantize_4bit(const QuantizedMatrix& matrix, DType dtype, void* output, cudaStream_t stream) {
  const int64_t numel = matrix.numel();
  if (numel <= 0) return;
  const Weight weight = make_weight(matrix);
  const int64_t tiles = ceil_div(numel, kTile);
  const unsigned grid = static_cast<unsigned>(tiles < (int64_t{1} << 30) ? tiles : (int64_t{1} << 30));
  const bool vector = aligned_16(output) && reinterpret_cast<uintptr_t>(matrix.packed) % 4 == 0;
  with_element_type(dtype, [&](auto element) {
    using T = decltype(element);
    dequantize_4bit_kernel<T><<<grid, kThreads, 0, stream>>>(weight, vector, static_cast<T*>(output));
  });
  check_launch("dequantize_4bit", "of [" + std::to_string(matrix.n) + ", " + std::to_string(matrix.k) + "]");
}

}  // namespace pyquant::cuda
