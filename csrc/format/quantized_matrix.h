// What the kernels agree on: element types, the 4-bit matrix and its statistics.
//
// The bytes are bitsandbytes': the matrix is flattened row-major, two elements a byte with the even element in the
// high nibble, and blocks of `blocksize` elements run over the flattened order, so a block may cross rows and the last
// one may be partial. With double quantization the blocks' absmax are themselves 8-bit codes.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define PYQUANT_HOST_DEVICE __host__ __device__
#else
#define PYQUANT_HOST_DEVICE
#endif

namespace pyquant {

// Element type of activations, of dequantized weights and of what is quantized.
enum class DType : int { kFloat32, kFloat16, kBFloat16 };

PYQUANT_HOST_DEVICE constexpr int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

enum class QuantType : int { kFP4, kNF4 };

// Elements of absmax that share one nested absmax under double quantization.
constexpr int64_t kNestedBlocksize = 256;

// A 4-bit matrix of n rows (output features) and k columns (input features). Borrowed pointers, on the device of the
// kernel that reads them. Exactly one of `absmax` and `absmax_codes` is set.
struct QuantizedMatrix {
  const uint8_t* packed;  // [ceil(n·k / 2)]
  int64_t n;
  int64_t k;
  QuantType type;
  int64_t blocksize;  // a power of two, 32 to 4096

  const float* absmax;  // [blocks()], without double quantization

  // With double quantization, absmax[i] = nested_code[absmax_codes[i]] · nested_absmax[i / 256] + offset, each of the
  // two operations rounded to float32 (no fused multiply-add: bitsandbytes rounds twice).
  const uint8_t* absmax_codes;  // [blocks()]
  const float* nested_absmax;   // [ceil(blocks() / 256)]
  const float* nested_code;     // [256]
  const float* offset;          // [1]

  PYQUANT_HOST_DEVICE int64_t numel() const { return n * k; }
  PYQUANT_HOST_DEVICE int64_t blocks() const { return (numel() + blocksize - 1) / blocksize; }
  PYQUANT_HOST_DEVICE bool double_quantized() const { return absmax_codes != nullptr; }
};

}  // namespace pyquant
