#include "kernels/cpu/quantize.h"

#include <algorithm>

#include "kernels/cpu/isa.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/scalar.h"

namespace pyquant::cpu {
namespace {

struct Codebook {
  const float* thresholds;  // [15], ascending
  const uint8_t* order;     // [16]

  explicit Codebook(QuantType type)
      : thresholds(type == QuantType::kNF4 ? kNF4Thresholds.value : kFP4Thresholds.value),
        order(type == QuantType::kNF4 ? kNF4Order : kFP4Order) {}

  // Not above is the test, rather than above, so that a NaN takes the last code as in bitsandbytes.
  int code(float value) const {
    int index = 0;
    for (int step = 8; step > 0; step /= 2) {
      if (!(value <= thresholds[index + step - 1])) index += step;
    }
    return order[index];
  }
};

// The largest magnitude, or a NaN if there is one: as integers, magnitudes order the same way and NaNs come last.
template <typename T>
float absmax_of(const T* input, int64_t count) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, bits_of(to_float(input[i])) & 0x7fffffff);
  return float_of(largest);
}

// Packs normalize(input[i]) for i in [0, count), the first element into a high nibble.
template <typename T, typename Normalize>
void pack(const T* input, int64_t count, const Codebook& codebook, const Normalize& normalize, uint8_t* packed) {
  for (int64_t i = 0; i < count; i += 2) {
    const int even = codebook.code(normalize(to_float(input[i])));
    const int odd = i + 1 < count ? codebook.code(normalize(to_float(input[i + 1]))) : codebook.code(0.0f);
    packed[i / 2] = static_cast<uint8_t>(even << 4 | odd);
  }
}

template <typename T>
void quantize_whole_blocks(const T* input, int64_t begin, int64_t end, QuantType type, int64_t blocksize,
                           uint8_t* packed, float* absmax) {
  const Codebook codebook(type);
  for (int64_t block = begin; block < end; ++block) {
    const T* values = input + block * blocksize;
    absmax[block] = absmax_of(values, blocksize);
    const float guarded = absmax[block] < kMinAbsmax ? kMinAbsmax : absmax[block];
    const float inverse = 1.0f / guarded;
    pack(values, blocksize, codebook, [=](float value) { return value * inverse; }, packed + block * blocksize / 2);
  }
}

// The partial last block differs from the others in bitsandbytes: a true division, and the guarded absmax is stored.
template <typename T>
void quantize_partial_block(const T* input, int64_t count, QuantType type, uint8_t* packed, float* absmax) {
  const float largest = absmax_of(input, count);
  const float guarded = largest < kMinAbsmax ? kMinAbsmax : largest;
  *absmax = guarded;
  pack(input, count, Codebook(type), [=](float value) { return value / guarded; }, packed);
}

// Calls f with a null pointer of dtype's element type.
template <typename F>
void with_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(static_cast<const float*>(nullptr));
    case DType::kFloat16:
      return f(static_cast<const Half*>(nullptr));
    case DType::kBFloat16:
      return f(static_cast<const BFloat16*>(nullptr));
  }
}

void quantize_blocks_portable(DType dtype, const void* input, int64_t begin, int64_t end, QuantType type,
                              int64_t blocksize, uint8_t* packed, float* absmax) {
  with_type(dtype, [&](auto* typed) {
    quantize_whole_blocks(static_cast<decltype(typed)>(input), begin, end, type, blocksize, packed, absmax);
  });
}

QuantizeBlocks quantize_blocks() {
#if PYQUANT_X86
  if (isa() >= Isa::kAvx512) return quantize_blocks_avx512;
  if (isa() >= Isa::kAvx2) return quantize_blocks_avx2;
#endif
  return quantize_blocks_portable;
}

constexpr int64_t kGrain = 1 << 15;  // elements worth a thread's while

}  // namespace

void quantize_4bit(DType dtype, const void* input, int64_t numel, QuantType type, int64_t blocksize, uint8_t* packed,
                   float* absmax) {
  const int64_t whole = numel / blocksize;
  const QuantizeBlocks quantize = quantize_blocks();
  parallel_for(whole, std::max<int64_t>(1, kGrain / blocksize), [&](int64_t begin, int64_t end) {
    quantize(dtype, input, begin, end, type, blocksize, packed, absmax);
  });
  const int64_t done = whole * blocksize;
  if (done == numel) return;
  with_type(dtype, [&](auto* typed) {
    quantize_partial_block(static_cast<decltype(typed)>(input) + done, numel - done, type, packed + done / 2,
                           absmax + whole);
  });
}

}  // namespace pyquant::cpu
