// Turns nibbles into values: a table of the 16 products of code and absmax, each rounded once to the element type, is
// made for a block, and every element of the block is a look-up in it. That is bit for bit a product per element.
//
// Internal linkage throughout (isa.h); how a table is held depends on the including file's instruction set.
#pragma once

#include "kernels/cpu/simd.h"

namespace pyquant::cpu {
namespace {

// The table's 16 entries as the element type T, and look-ups of 32 consecutive elements (16 bytes).
template <typename T>
struct Table {
  T entries[16];

  Table(const float* values, float absmax) {
    for (int i = 0; i < 16; ++i) entries[i] = round_to<T>(values[i] * absmax);
  }
  T look_up(int nibble) const { return entries[nibble]; }
  void look_up_32(const uint8_t* bytes, T* to) const {
    for (int i = 0; i < 16; ++i) {
      to[2 * i] = entries[bytes[i] >> 4];
      to[2 * i + 1] = entries[bytes[i] & 15];
    }
  }
};

#if defined(__AVX512F__)

// The nibbles of 16 bytes as indices in 32-bit lanes: the even elements', and the odd elements' with the even ones'
// left in the bits above, which the permutations ignore.
struct Indices {
  __m512i even, odd;

  explicit Indices(const uint8_t* bytes)
      : odd(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)))) {
    even = _mm512_srli_epi32(odd, 4);
  }
};

template <>
struct Table<float> {
  __m512 entries;

  Table(const float* values, float absmax) : entries(_mm512_mul_ps(_mm512_loadu_ps(values), _mm512_set1_ps(absmax))) {}
  float look_up(int nibble) const {
    return _mm512_cvtss_f32(_mm512_permutexvar_ps(_mm512_set1_epi32(nibble), entries));
  }
  void look_up_32(const uint8_t* bytes, float* to) const {
    const Indices indices(bytes);
    const __m512 even = _mm512_permutexvar_ps(indices.even, entries);
    const __m512 odd = _mm512_permutexvar_ps(indices.odd, entries);
    const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i second = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    _mm512_storeu_ps(to, _mm512_permutex2var_ps(even, first, odd));
    _mm512_storeu_ps(to + 16, _mm512_permutex2var_ps(even, second, odd));
  }
};

// Sixteen-bit entries, twice over: the permutation's index has five bits, of which the fifth belongs to another nibble.
template <typename T>
struct WordTable {
  __m512i entries;

  WordTable(const float* values, float absmax) {
    alignas(32) T rounded[16];
    Vec{_mm512_mul_ps(_mm512_loadu_ps(values), _mm512_set1_ps(absmax))}.store(rounded);
    entries = _mm512_broadcast_i64x4(_mm256_load_si256(reinterpret_cast<const __m256i*>(rounded)));
  }
  T look_up(int nibble) const {
    const __m512i found = _mm512_permutexvar_epi16(_mm512_set1_epi16(static_cast<short>(nibble)), entries);
    return {static_cast<uint16_t>(_mm_cvtsi128_si32(_mm512_castsi512_si128(found)))};
  }
  void look_up_32(const uint8_t* bytes, T* to) const {
    // Each byte into both halves of a 32-bit lane: the low half looks up the high nibble, which comes first.
    const __m512i low = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
    const __m512i spread = _mm512_or_si512(low, _mm512_slli_epi32(low, 16));
    const __m512i indices = _mm512_srlv_epi16(spread, _mm512_set1_epi32(4));
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(indices, entries));
  }
};

template <>
struct Table<Half> : WordTable<Half> {
  using WordTable<Half>::WordTable;
};
template <>
struct Table<BFloat16> : WordTable<BFloat16> {
  using WordTable<BFloat16>::WordTable;
};

#elif defined(__AVX2__)

template <>
struct Table<float> {
  float entries[16];
  __m256 low, high;  // of entries 0..7 and 8..15

  Table(const float* values, float absmax) {
    const __m256 scale = _mm256_set1_ps(absmax);
    low = _mm256_mul_ps(_mm256_loadu_ps(values), scale);
    high = _mm256_mul_ps(_mm256_loadu_ps(values + 8), scale);
    _mm256_storeu_ps(entries, low);
    _mm256_storeu_ps(entries + 8, high);
  }
  float look_up(int nibble) const { return entries[nibble]; }
  // Eight elements, from four bytes.
  __m256 look_up_8(const uint8_t* bytes) const {
    int word;
    std::memcpy(&word, bytes, 4);
    const __m256i indices = _mm256_srlv_epi32(_mm256_set1_epi32(word), _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24));
    const __m256 upper_half = _mm256_castsi256_ps(_mm256_slli_epi32(indices, 28));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, indices), _mm256_permutevar8x32_ps(high, indices),
                            upper_half);
  }
  void look_up_32(const uint8_t* bytes, float* to) const {
    for (int i = 0; i < 4; ++i) _mm256_storeu_ps(to + 8 * i, look_up_8(bytes + 4 * i));
  }
};

template <typename T>
struct WordTable {
  alignas(16) T entries[16];
  __m256i low_bytes, high_bytes;  // of the 16 entries, in both halves of the register

  WordTable(const float* values, float absmax) {
    const __m256 scale = _mm256_set1_ps(absmax);
    Vec{_mm256_mul_ps(_mm256_loadu_ps(values), scale)}.store(entries);
    Vec{_mm256_mul_ps(_mm256_loadu_ps(values + 8), scale)}.store(entries + 8);
    const __m128i first = _mm_load_si128(reinterpret_cast<const __m128i*>(entries));
    const __m128i second = _mm_load_si128(reinterpret_cast<const __m128i*>(entries + 8));
    const __m128i byte = _mm_set1_epi16(0xff);
    low_bytes = _mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_and_si128(first, byte), _mm_and_si128(second, byte)));
    high_bytes = _mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_srli_epi16(first, 8), _mm_srli_epi16(second, 8)));
  }
  T look_up(int nibble) const { return entries[nibble]; }
  void look_up_32(const uint8_t* bytes, T* to) const {
    const __m128i loaded = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
    const __m128i mask = _mm_set1_epi8(15);
    const __m128i even = _mm_and_si128(_mm_srli_epi16(loaded, 4), mask), odd = _mm_and_si128(loaded, mask);
    const __m256i indices = _mm256_set_m128i(_mm_unpackhi_epi8(even, odd), _mm_unpacklo_epi8(even, odd));
    const __m256i low = _mm256_shuffle_epi8(low_bytes, indices), high = _mm256_shuffle_epi8(high_bytes, indices);
    const __m256i first = _mm256_unpacklo_epi8(low, high), second = _mm256_unpackhi_epi8(low, high);
    __m256i* out = reinterpret_cast<__m256i*>(to);
    _mm256_storeu_si256(out, _mm256_permute2x128_si256(first, second, 0x20));
    _mm256_storeu_si256(out + 1, _mm256_permute2x128_si256(first, second, 0x31));
  }
};

template <>
struct Table<Half> : WordTable<Half> {
  using WordTable<Half>::WordTable;
};
template <>
struct Table<BFloat16> : WordTable<BFloat16> {
  using WordTable<BFloat16>::WordTable;
};

#endif

// Elements [begin, begin + count) of the flattened matrix.
template <typename T>
void decode(const QuantizedMatrix& weight, int64_t begin, int64_t count, T* to) {
  const float* values = values_of(weight.type);
  const int64_t end = begin + count;
  while (begin < end) {
    const int64_t block = block_of(weight, begin);
    const int64_t stop = smaller(end, (block + 1) * weight.blocksize);
    const Table<T> table(values, block_absmax(weight, block));
    if (begin & 1) *to++ = table.look_up(nibble_at(weight.packed, begin++));
    for (; begin + 32 <= stop; begin += 32, to += 32) table.look_up_32(weight.packed + begin / 2, to);
    for (; begin < stop; ++begin) *to++ = table.look_up(nibble_at(weight.packed, begin));
  }
}

}  // namespace
}  // namespace pyquant::cpu
