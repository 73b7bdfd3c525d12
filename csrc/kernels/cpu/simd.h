// A vector of floats of the instruction set that the including file is compiled for, and conversions of whole rows.
// Internal linkage throughout (isa.h).
#pragma once

#include "kernels/cpu/scalar.h"

#if defined(__AVX2__)
// GCC 12 warns of the deliberately undefined registers inside its own intrinsics once they are inlined.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace pyquant::cpu {
namespace {

#if defined(__AVX512F__)

struct Vec {
  static constexpr int kLanes = 16;
  __m512 v;

  static Vec zero() { return {_mm512_setzero_ps()}; }
  static Vec broadcast(float value) { return {_mm512_set1_ps(value)}; }
  static Vec load(const float* from) { return {_mm512_loadu_ps(from)}; }
  void store(float* to) const { _mm512_storeu_ps(to, v); }
  void multiply_add(Vec a, Vec b) { v = _mm512_fmadd_ps(a.v, b.v, v); }
  float sum() const { return _mm512_reduce_add_ps(v); }

  static Vec load(const Half* from) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)))};
  }
  static Vec load(const BFloat16* from) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
  }
  void store(Half* to) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  void store(BFloat16* to) const {
    // vcvtneps2bf16 would flush subnormals.
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i result = _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(result));
  }
};

#elif defined(__AVX2__)

struct Vec {
  static constexpr int kLanes = 8;
  __m256 v;

  static Vec zero() { return {_mm256_setzero_ps()}; }
  static Vec broadcast(float value) { return {_mm256_set1_ps(value)}; }
  static Vec load(const float* from) { return {_mm256_loadu_ps(from)}; }
  void store(float* to) const { _mm256_storeu_ps(to, v); }
  void multiply_add(Vec a, Vec b) { v = _mm256_fmadd_ps(a.v, b.v, v); }
  float sum() const {
    const __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 quarter = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
  }

  static Vec load(const Half* from) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))};
  }
  static Vec load(const BFloat16* from) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
  }
  void store(Half* to) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  void store(BFloat16* to) const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i result = _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), _mm256_set1_epi32(0x7fc0), nan);
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(result, result), 0b1000);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(words));
  }
};

#else

// Sixteen bytes: what the baseline of every 64-bit processor has.
struct Vec {
  static constexpr int kLanes = 4;
  float v[4];

  static Vec zero() { return {{0, 0, 0, 0}}; }
  static Vec broadcast(float value) { return {{value, value, value, value}}; }
  template <typename T>
  static Vec load(const T* from) {
    return {{to_float(from[0]), to_float(from[1]), to_float(from[2]), to_float(from[3])}};
  }
  template <typename T>
  void store(T* to) const {
    for (int i = 0; i < 4; ++i) to[i] = round_to<T>(v[i]);
  }
  void multiply_add(Vec a, Vec b) {
    for (int i = 0; i < 4; ++i) v[i] += a.v[i] * b.v[i];
  }
  float sum() const { return (v[0] + v[2]) + (v[1] + v[3]); }
};

#endif

template <typename From, typename To>
void convert_row(const From* from, int64_t count, To* to) {
  int64_t i = 0;
  for (; i + Vec::kLanes <= count; i += Vec::kLanes) Vec::load(from + i).store(to + i);
  for (; i < count; ++i) to[i] = round_to<To>(to_float(from[i]));
}

// Elements [offset, offset + count) of an array of `dtype`, as floats.
[[maybe_unused]] inline void load_row(DType dtype, const void* from, int64_t offset, int64_t count, float* to) {
  if (dtype == DType::kFloat32) {
    std::memcpy(to, static_cast<const float*>(from) + offset, count * sizeof(float));
  } else if (dtype == DType::kBFloat16) {
    convert_row(static_cast<const BFloat16*>(from) + offset, count, to);
  } else {
    convert_row(static_cast<const Half*>(from) + offset, count, to);
  }
}

// The other way, each value rounded once.
[[maybe_unused]] inline void store_row(DType dtype, const float* from, int64_t count, void* to, int64_t offset) {
  if (dtype == DType::kFloat32) {
    std::memcpy(static_cast<float*>(to) + offset, from, count * sizeof(float));
  } else if (dtype == DType::kBFloat16) {
    convert_row(from, count, static_cast<BFloat16*>(to) + offset);
  } else {
    convert_row(from, count, static_cast<Half*>(to) + offset);
  }
}

}  // namespace
}  // namespace pyquant::cpu
