#include "kernels/cpu/dropout.h"
#include "kernels/cpu/simd.h"

namespace pyquant::cpu {
namespace {

// The two halves of 16 products of 32 bits.
struct Product {
  __m512i high, low;

  Product(__m512i a, __m512i b) {
    const __m512i even = _mm512_mul_epu32(a, b);
    const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), b);
    low = _mm512_mask_mov_epi32(even, 0xaaaa, _mm512_slli_epi64(odd, 32));
    high = _mm512_mask_mov_epi32(_mm512_srli_epi64(even, 32), 0xaaaa, odd);
  }
};

// philox.h for 16 counters from `counter` on: masks for their 64 draws.
void masks_of_64(uint64_t seed, __m512i threshold, uint64_t counter, uint32_t* masks) {
  // Lane 4i + j holds counter 4j + i, so that the unpacking below ends with the draws in order.
  const __m512i offsets = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i base = _mm512_set1_epi32(static_cast<int>(static_cast<uint32_t>(counter)));
  __m512i c0 = _mm512_add_epi32(base, offsets);
  const __mmask16 carry = _mm512_cmplt_epu32_mask(c0, base);
  __m512i c1 = _mm512_set1_epi32(static_cast<int>(static_cast<uint32_t>(counter >> 32)));
  c1 = _mm512_mask_add_epi32(c1, carry, c1, _mm512_set1_epi32(1));
  __m512i c2 = _mm512_setzero_si512(), c3 = _mm512_setzero_si512();
  __m512i key0 = _mm512_set1_epi32(static_cast<int>(static_cast<uint32_t>(seed)));
  __m512i key1 = _mm512_set1_epi32(static_cast<int>(static_cast<uint32_t>(seed >> 32)));
  const __m512i multiplier0 = _mm512_set1_epi32(static_cast<int>(0xD2511F53u));
  const __m512i multiplier1 = _mm512_set1_epi32(static_cast<int>(0xCD9E8D57u));
  for (int round = 0; round < 10; ++round) {
    const Product product0(c0, multiplier0), product1(c2, multiplier1);
    c0 = _mm512_xor_si512(_mm512_xor_si512(product1.high, c1), key0);
    c2 = _mm512_xor_si512(_mm512_xor_si512(product0.high, c3), key1);
    c1 = product1.low;
    c3 = product0.low;
    key0 = _mm512_add_epi32(key0, _mm512_set1_epi32(static_cast<int>(0x9E3779B9u)));
    key1 = _mm512_add_epi32(key1, _mm512_set1_epi32(static_cast<int>(0xBB67AE85u)));
  }
  const auto kept = [threshold](__m512i draws) { return _mm512_movm_epi32(_mm512_cmpge_epu32_mask(draws, threshold)); };
  const __m512i k0 = kept(c0), k1 = kept(c1), k2 = kept(c2), k3 = kept(c3);
  const __m512i low01 = _mm512_unpacklo_epi32(k0, k1), high01 = _mm512_unpackhi_epi32(k0, k1);
  const __m512i low23 = _mm512_unpacklo_epi32(k2, k3), high23 = _mm512_unpackhi_epi32(k2, k3);
  _mm512_storeu_si512(masks, _mm512_unpacklo_epi64(low01, low23));
  _mm512_storeu_si512(masks + 16, _mm512_unpackhi_epi64(low01, low23));
  _mm512_storeu_si512(masks + 32, _mm512_unpacklo_epi64(high01, high23));
  _mm512_storeu_si512(masks + 48, _mm512_unpackhi_epi64(high01, high23));
}

}  // namespace

void dropout_masks_avx512(uint64_t seed, uint32_t threshold, uint64_t index, int64_t count, uint32_t* masks) {
  const __m512i limit = _mm512_set1_epi32(static_cast<int>(threshold));
  alignas(64) uint32_t buffer[64];
  for (int64_t i = 0; i < count;) {
    const int64_t skipped = static_cast<int64_t>((index + i) % 4);
    if (skipped == 0 && count - i >= 64) {
      masks_of_64(seed, limit, (index + i) / 4, masks + i);
      i += 64;
      continue;
    }
    masks_of_64(seed, limit, (index + i) / 4, buffer);
    const int64_t taken = smaller(64 - skipped, count - i);
    std::memcpy(masks + i, buffer + skipped, taken * sizeof(uint32_t));
    i += taken;
  }
}

}  // namespace pyquant::cpu
