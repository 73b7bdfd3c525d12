// How the AVX-512 and AMX engines read a weight whose rows become columns. Internal linkage (isa.h).
#pragma once

#include "kernels/cpu/simd.h"

namespace pyquant::cpu {
namespace {

// A strip of 16 rows of a weight and 32 depths, that is 16 bytes of each row, becomes 32 vectors of one depth and 16
// columns. The bytes are transposed rather than the values: four bytes of every row in a register are eight depths, and
// the rows' absmax are a register too.
struct Strip {
  __m512i words[4];  // lane i: the i-th row's w-th four bytes

  Strip(const uint8_t* bytes, int64_t row_bytes) {
    __m512i group[4];  // rows i, 4 + i, 8 + i and 12 + i
    for (int i = 0; i < 4; ++i) {
      const auto load = [&](int row) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + row * row_bytes));
      };
      group[i] = _mm512_castsi128_si512(load(i));
      group[i] = _mm512_inserti32x4(group[i], load(4 + i), 1);
      group[i] = _mm512_inserti32x4(group[i], load(8 + i), 2);
      group[i] = _mm512_inserti32x4(group[i], load(12 + i), 3);
    }
    const __m512i low01 = _mm512_unpacklo_epi32(group[0], group[1]), high01 = _mm512_unpackhi_epi32(group[0], group[1]);
    const __m512i low23 = _mm512_unpacklo_epi32(group[2], group[3]), high23 = _mm512_unpackhi_epi32(group[2], group[3]);
    words[0] = _mm512_unpacklo_epi64(low01, low23);
    words[1] = _mm512_unpackhi_epi64(low01, low23);
    words[2] = _mm512_unpacklo_epi64(high01, high23);
    words[3] = _mm512_unpackhi_epi64(high01, high23);
  }
};

// Columns over which no row's absmax changes, counted from a multiple of it: a power of two, at least 32.
inline int64_t constant_run(const QuantizedMatrix& weight) { return smaller(weight.blocksize, weight.k & -weight.k); }

// The 16 rows' absmax at the same column.
inline __m512 strip_absmax(const QuantizedMatrix& weight, int64_t row, int64_t column) {
  alignas(64) float absmax[16];
  for (int i = 0; i < 16; ++i) absmax[i] = block_absmax(weight, block_of(weight, (row + i) * weight.k + column));
  return _mm512_load_ps(absmax);
}

// Rows start at a byte, and no block begins or ends inside 32 aligned columns.
inline bool aligned(const QuantizedMatrix& weight) { return weight.k % 32 == 0; }

}  // namespace
}  // namespace pyquant::cpu
