// One element at a time: conversions between the element types, and what a block's statistics decode to.
//
// Everything here has internal linkage, because files for different instruction sets include it (isa.h).
#pragma once

#include <cstring>

#include "format/codebook.h"
#include "format/quantized_matrix.h"

namespace pyquant::cpu {
namespace {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <typename T>
constexpr DType kDTypeOf = DType::kFloat32;
template <>
constexpr DType kDTypeOf<Half> = DType::kFloat16;
template <>
constexpr DType kDTypeOf<BFloat16> = DType::kBFloat16;

[[maybe_unused]] inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
[[maybe_unused]] inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
[[maybe_unused]] inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }
[[maybe_unused]] inline int64_t bytes_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

[[maybe_unused]] inline float to_float(float value) { return value; }

[[maybe_unused]] inline float to_float(BFloat16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }

[[maybe_unused]] inline float to_float(Half value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16;
  const uint32_t magnitude = value.bits & 0x7fff;
  if (magnitude < 0x0400) {  // subnormal: a multiple of 2⁻²⁴
    const float result = static_cast<float>(magnitude) * 5.9604644775390625e-8f;
    return float_of(bits_of(result) | sign);
  }
  const uint32_t exponent_bias = magnitude >= 0x7c00 ? (255u - 31u) << 23 : (127u - 15u) << 23;
  return float_of(((magnitude << 13) + exponent_bias) | sign);
}

// To the nearest, ties to even. NaN stays NaN; what is too large becomes infinity.
template <typename T>
T round_to(float value);

template <>
[[maybe_unused]] inline float round_to<float>(float value) {
  return value;
}

template <>
[[maybe_unused]] inline BFloat16 round_to<BFloat16>(float value) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return {0x7fc0};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

template <>
[[maybe_unused]] inline Half round_to<Half>(float value) {
  const uint32_t sign = (bits_of(value) >> 16) & 0x8000;
  const uint32_t magnitude = bits_of(value) & 0x7fffffff;
  uint32_t result;
  if (magnitude > 0x7f800000) {
    result = 0x7e00;
  } else if (magnitude >= 0x477ff000) {  // 65520, halfway between the largest half and the next power of two
    result = 0x7c00;
  } else if (magnitude < 0x38800000) {
    // Below 2⁻¹⁴ a half is a multiple of 2⁻²⁴, which is 0.5f's last place: the addition rounds.
    result = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000;
  } else {
    result = (magnitude - ((127u - 15u) << 23) + 0x0fff + ((magnitude >> 13) & 1)) >> 13;
  }
  return {static_cast<uint16_t>(sign | result)};
}

// The 16 values of a quantization type.
[[maybe_unused]] inline const float* values_of(QuantType type) {
  return type == QuantType::kNF4 ? kNF4Values : kFP4Values;
}

// The block of an element of the flattened matrix: a shift, because block sizes are powers of two and a division would
// take as long as decoding half a block.
[[maybe_unused]] inline int64_t block_of(const QuantizedMatrix& weight, int64_t element) {
  return static_cast<int64_t>(static_cast<uint64_t>(element) >>
                              __builtin_ctzll(static_cast<uint64_t>(weight.blocksize)));
}

// A block's absmax, the double quantization undone. The two roundings are the format's.
[[maybe_unused]] inline float block_absmax(const QuantizedMatrix& weight, int64_t block) {
  if (weight.absmax_codes == nullptr) return weight.absmax[block];
  const float product = weight.nested_code[weight.absmax_codes[block]] *
                        weight.nested_absmax[static_cast<uint64_t>(block) / kNestedBlocksize];
  return product + *weight.offset;
}

// The nibble of an element of the flattened matrix.
[[maybe_unused]] inline int nibble_at(const uint8_t* packed, int64_t element) {
  const int byte = packed[element >> 1];
  return element & 1 ? byte & 15 : byte >> 4;
}

}  // namespace
}  // namespace pyquant::cpu
