#include "kernels/cpu/quantize.h"
#include "kernels/cpu/simd.h"

namespace pyquant::cpu {
namespace {

// Counts, for eight values at once, the thresholds that lie below each. "Not less or equal" counts every threshold for
// a NaN. A comparison gives -1 where it holds, so the count comes from subtractions.
struct Codebook {
  __m256 thresholds[15];
  __m128i order;

  explicit Codebook(QuantType type) {
    const bool nf4 = type == QuantType::kNF4;
    for (int i = 0; i < 15; ++i) {
      thresholds[i] = _mm256_set1_ps(nf4 ? kNF4Thresholds.value[i] : kFP4Thresholds.value[i]);
    }
    order = _mm_loadu_si128(reinterpret_cast<const __m128i*>(nf4 ? kNF4Order : kFP4Order));
  }

  __m256i count(__m256 v) const {
    __m256i result = _mm256_setzero_si256();
    for (int i = 0; i < 15; ++i) {
      result = _mm256_sub_epi32(result, _mm256_castps_si256(_mm256_cmp_ps(v, thresholds[i], _CMP_NLE_UQ)));
    }
    return result;
  }
};

template <typename T>
void quantize(const T* input, int64_t begin, int64_t end, QuantType type, int64_t blocksize, uint8_t* packed,
              float* absmax) {
  const Codebook codebook(type);
  for (int64_t block = begin; block < end; ++block) {
    const T* values = input + block * blocksize;
    // As integers magnitudes order the same way, and a NaN is above all of them.
    __m256i largest = _mm256_setzero_si256();
    for (int64_t i = 0; i < blocksize; i += 8) {
      const __m256i bits = _mm256_castps_si256(Vec::load(values + i).v);
      largest = _mm256_max_epi32(largest, _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff)));
    }
    alignas(32) int lanes[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), largest);
    int most = 0;
    for (int lane : lanes) most = lane > most ? lane : most;
    const float magnitude = float_of(static_cast<uint32_t>(most));
    absmax[block] = magnitude;
    const __m256 inverse = _mm256_set1_ps(1.0f / (magnitude < kMinAbsmax ? kMinAbsmax : magnitude));
    uint8_t* to = packed + block * blocksize / 2;
    for (int64_t i = 0; i < blocksize; i += 16, to += 8) {
      const __m256i first = codebook.count(_mm256_mul_ps(Vec::load(values + i).v, inverse));
      const __m256i second = codebook.count(_mm256_mul_ps(Vec::load(values + i + 8).v, inverse));
      const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(first, second), 0b11011000);
      const __m128i counts = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
      const __m128i codes = _mm_shuffle_epi8(codebook.order, counts);
      const __m128i pairs = _mm_maddubs_epi16(codes, _mm_set1_epi16(0x0110));  // 16 · the even code + the odd one
      _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(pairs, pairs));
    }
  }
}

}  // namespace

void quantize_blocks_avx2(DType dtype, const void* input, int64_t begin, int64_t end, QuantType type, int64_t blocksize,
                          uint8_t* packed, float* absmax) {
  if (dtype == DType::kFloat32) {
    quantize(static_cast<const float*>(input), begin, end, type, blocksize, packed, absmax);
  } else if (dtype == DType::kBFloat16) {
    quantize(static_cast<const BFloat16*>(input), begin, end, type, blocksize, packed, absmax);
  } else {
    quantize(static_cast<const Half*>(input), begin, end, type, blocksize, packed, absmax);
  }
}

}  // namespace pyquant::cpu
