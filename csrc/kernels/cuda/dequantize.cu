// The whole matrix back to an element type, in one launch.
#include "kernels/cuda/element.h"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/weight.h"
#include "ptx/cluster.h"

namespace pyquant::cuda {
namespace {

// A thread writes 16 bytes at a time, 8 elements of a 16-bit type out of 4 packed bytes or 4 of float32 out of 2, so
// that a warp's accesses are contiguous. Several such pieces a thread are loaded before the first is used, to have
// enough bytes in flight.
constexpr int kThreads = 256;
template <typename T>
constexpr int kElements = 16 / sizeof(T);
template <typename T>
constexpr int kPieces = 2 * sizeof(T);
template <typename T>
constexpr int64_t kTile = int64_t{kThreads} * kElements<T> * kPieces<T>;

// Plain loads throughout, not weight.h's __ldg: the kernel starts early, when its operands may still be being written.
template <typename T>
__device__ uint32_t load_packed(const uint8_t* packed) {
  if constexpr (kElements<T> == 4) return *reinterpret_cast<const uint16_t*>(packed);
  return *reinterpret_cast<const uint32_t*>(packed);
}

__device__ inline AbsmaxLoad load_absmax_plainly(const Weight& weight, int64_t block) {
  const QuantizedMatrix& matrix = weight.matrix;
  if (!matrix.double_quantized()) return {__float_as_uint(matrix.absmax[block]), 0.0f};
  return {matrix.absmax_codes[block], matrix.nested_absmax[block / kNestedBlocksize]};
}

template <typename T>
__device__ void store_elements(T* output, const float (&value)[8]) {
  if constexpr (sizeof(T) == 4) {
    *reinterpret_cast<float4*>(output) = make_float4(value[0], value[1], value[2], value[3]);
  } else {
    *reinterpret_cast<uint4*>(output) = make_uint4(pack_pair<T>(value[0], value[1]), pack_pair<T>(value[2], value[3]),
                                                   pack_pair<T>(value[4], value[5]), pack_pair<T>(value[6], value[7]));
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    dequantize_4bit_kernel(const __grid_constant__ Weight weight, bool vector, T* output) {
  __shared__ DecodeTables tables;
  ptx::wait_for_previous_kernel();
  load_tables(tables, weight);
  const float offset = weight.matrix.double_quantized() ? *weight.matrix.offset : 0.0f;
  const int64_t numel = weight.matrix.numel();
  __syncthreads();

  for (int64_t tile = int64_t{blockIdx.x} * kTile<T>; tile < numel; tile += int64_t{gridDim.x} * kTile<T>) {
    const int64_t first = tile + int64_t{threadIdx.x} * kElements<T>;
    uint32_t word[kPieces<T>];
    AbsmaxLoad absmax[kPieces<T>];
#pragma unroll
    for (int i = 0; i < kPieces<T>; ++i) {
      const int64_t begin = first + int64_t{i} * kThreads * kElements<T>;
      word[i] = 0;
      absmax[i] = AbsmaxLoad{0, 0.0f};
      if (begin >= numel) continue;
      if (vector && begin + kElements<T> <= numel) {
        word[i] = load_packed<T>(weight.matrix.packed + begin / 2);
      } else {
#pragma unroll
        for (int byte = 0; byte < kElements<T> / 2; ++byte) {
          if (begin + 2 * byte < numel) {
            word[i] |= uint32_t{weight.matrix.packed[begin / 2 + byte]} << (8 * byte);
          }
        }
      }
      absmax[i] = load_absmax_plainly(weight, begin >> weight.blocksize_log2);
    }
#pragma unroll
    for (int i = 0; i < kPieces<T>; ++i) {
      const int64_t begin = first + int64_t{i} * kThreads * kElements<T>;
      if (begin >= numel) continue;
      const float scale = finish_absmax(tables, weight, absmax[i], offset);
      float value[8];  // of float32, the first four
      decode_word(tables, word[i], value);
#pragma unroll
      for (int j = 0; j < kElements<T>; ++j) value[j] = __fmul_rn(value[j], scale);
      if (vector && begin + kElements<T> <= numel) {
        store_elements(output + begin, value);
      } else {
#pragma unroll
        for (int j = 0; j < kElements<T>; ++j) {
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
  const bool vector = aligned_16(output) && reinterpret_cast<uintptr_t>(matrix.packed) % 4 == 0;
  with_element_type(dtype, [&](auto element) {
    using T = decltype(element);
    const int64_t tiles = ceil_div(numel, kTile<T>);
    const unsigned grid = static_cast<unsigned>(tiles < (int64_t{1} << 30) ? tiles : (int64_t{1} << 30));
    launch_kernel("dequantize_4bit", "of [" + std::to_string(matrix.n) + ", " + std::to_string(matrix.k) + "]",
                  {grid, kThreads, 0, stream, 1, true}, dequantize_4bit_kernel<T>, weight, vector,
                  static_cast<T*>(output));
  });
}

}  // namespace pyquant::cuda
