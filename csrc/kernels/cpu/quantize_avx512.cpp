#include "kernels/cpu/quantize.h"
#include "kernels/cpu/simd.h"

namespace pyquant::cpu {
namespace {

// Counts, for 16 values at once, the thresholds that lie below each: a binary search whose table look-ups are
// permutations of a register. "Not less or equal" counts every threshold for a NaN.
struct Codebook {
  __m512 by_four, by_two, by_one;  // thresholds[i + 3], [i + 1] and [i] in lane i
  __m512 middle;                   // thresholds[7]
  __m512i order;
  bool ordered;

  explicit Codebook(QuantType type) {
    const bool nf4 = type == QuantType::kNF4;
    const float* thresholds = nf4 ? kNF4Thresholds.value : kFP4Thresholds.value;
    const uint8_t* codes = nf4 ? kNF4Order : kFP4Order;
    float padded[32] = {};
    for (int i = 0; i < 15; ++i) padded[i] = thresholds[i];
    by_four = _mm512_loadu_ps(padded + 3);
    by_two = _mm512_loadu_ps(padded + 1);
    by_one = _mm512_loadu_ps(padded);
    middle = _mm512_set1_ps(thresholds[7]);
    order = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    ordered = nf4;
  }

  __m128i codes(__m512 v) const {
    const auto above = [v](__m512 threshold) { return _mm512_cmp_ps_mask(v, threshold, _CMP_NLE_UQ); };
    __m512i index = _mm512_maskz_set1_epi32(above(middle), 8);
    index = _mm512_mask_add_epi32(index, above(_mm512_permutexvar_ps(index, by_four)), index, _mm512_set1_epi32(4));
    index = _mm512_mask_add_epi32(index, above(_mm512_permutexvar_ps(index, by_two)), index, _mm512_set1_epi32(2));
    index = _mm512_mask_add_epi32(index, above(_mm512_permutexvar_ps(index, by_one)), index, _mm512_set1_epi32(1));
    if (!ordered) index = _mm512_permutexvar_epi32(index, order);
    return _mm512_cvtepi32_epi8(index);
  }
};

template <typename T>
void quantize(const T* input, int64_t begin, int64_t end, QuantType type, int64_t blocksize, uint8_t* packed,
              float* absmax) {
  const Codebook codebook(type);
  const __m256i join = _mm256_set1_epi16(0x0110);  // 16 · the even code + the odd one
  for (int64_t block = begin; block < end; ++block) {
    const T* values = input + block * blocksize;
    // As integers magnitudes order the same way, and a NaN is above all of them.
    __m512i largest = _mm512_setzero_si512();
    for (int64_t i = 0; i < blocksize; i += 16) {
      const __m512i bits = _mm512_castps_si512(Vec::load(values + i).v);
      largest = _mm512_max_epi32(largest, _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff)));
    }
    const float magnitude = float_of(static_cast<uint32_t>(_mm512_reduce_max_epi32(largest)));
    absmax[block] = magnitude;
    const __m512 inverse = _mm512_set1_ps(1.0f / (magnitude < kMinAbsmax ? kMinAbsmax : magnitude));
    uint8_t* to = packed + block * blocksize / 2;
    for (int64_t i = 0; i < blocksize; i += 32, to += 16) {
      const __m128i first = codebook.codes(_mm512_mul_ps(Vec::load(values + i).v, inverse));
      const __m128i second = codebook.codes(_mm512_mul_ps(Vec::load(values + i + 16).v, inverse));
      const __m256i pairs = _mm256_maddubs_epi16(_mm256_set_m128i(second, first), join);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtepi16_epi8(pairs));
    }
  }
}

}  // namespace

void quantize_blocks_avx512(DType dtype, const void* input, int64_t begin, int64_t end, QuantType type,
                            int64_t blocksize, uint8_t* packed, float* absmax) {
  if (dtype == DType::kFloat32) {
    quantize(static_cast<const float*>(input), begin, end, type, blocksize, packed, absmax);
  } else if (dtype == DType::kBFloat16) {
    quantize(static_cast<const BFloat16*>(input), begin, end, type, blocksize, packed, absmax);
  } else {
    quantize(static_cast<const Half*>(input), begin, end, type, blocksize, packed, absmax);
  }
}

}  // namespace pyquant::cpu
