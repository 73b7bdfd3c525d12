// Decoding of the 4-bit format inside kernels.
#pragma once

#include "format/codebook.h"
#include "format/quantized_matrix.h"
#include "kernels/cuda/element.h"

namespace pyquant::cuda {

// A 4-bit matrix as kernels take it, by value: the codebook comes along, so that no kernel is compiled once per
// quantization type.
struct Weight {
  QuantizedMatrix matrix;
  int blocksize_log2;
  float codebook[16];
};

inline Weight make_weight(const QuantizedMatrix& matrix) {
  Weight weight{matrix, 0, {}};
  while ((int64_t{1} << weight.blocksize_log2) < matrix.blocksize) ++weight.blocksize_log2;
  for (int i = 0; i < 16; ++i) {
    weight.codebook[i] = matrix.type == QuantType::kNF4 ? kNF4Values[i] : kFP4Values[i];
  }
  return weight;
}

// The tables a block of threads decodes with. Sixteen consecutive floats lie in sixteen banks, so that any mixture of
// nibbles in a warp reads `codebook` without a conflict.
struct DecodeTables {
  float codebook[16];
  float nested_code[256];
};

// Ends without a barrier; the caller has one before the first use.
__device__ inline void load_tables(DecodeTables& tables, const Weight& weight) {
  for (int i = threadIdx.x; i < 16; i += blockDim.x) tables.codebook[i] = weight.codebook[i];
  if (weight.matrix.double_quantized()) {
    for (int i = threadIdx.x; i < 256; i += blockDim.x) tables.nested_code[i] = weight.matrix.nested_code[i];
  }
}

// A block's absmax in two halves: the loads, and the arithmetic on what they brought. Between the two, a kernel does
// something useful.
struct AbsmaxLoad {
  uint32_t raw;  // the 8-bit code, or without double quantization the bits of the absmax itself
  float nested;
};

__device__ inline AbsmaxLoad load_absmax(const Weight& weight, int64_t block) {
  const QuantizedMatrix& matrix = weight.matrix;
  if (!matrix.double_quantized()) return {__float_as_uint(__ldg(matrix.absmax + block)), 0.0f};
  return {__ldg(matrix.absmax_codes + block), __ldg(matrix.nested_absmax + (block >> 8))};
}
static_assert(kNestedBlocksize == 1 << 8, "load_absmax shifts by 8");

// `offset` is load_offset's. Multiplication and addition round separately, as the format has it.
__device__ inline float finish_absmax(const DecodeTables& tables, const Weight& weight, AbsmaxLoad load, float offset) {
  if (!weight.matrix.double_quantized()) return __uint_as_float(load.raw);
  return __fadd_rn(__fmul_rn(tables.nested_code[load.raw], load.nested), offset);
}

__device__ inline float load_offset(const Weight& weight) {
  return weight.matrix.double_quantized() ? __ldg(weight.matrix.offset) : 0.0f;
}

// Bits [shift, shift + 4) of `word` through the codebook. Scaled to a byte offset by the shift itself: one instruction
// less than an index.
template <int kShift>
__device__ inline float decode_nibble(const DecodeTables& tables, uint32_t word) {
  const uint32_t offset = (kShift >= 2 ? word >> (kShift - 2) : word << (2 - kShift)) & 0x3Cu;
  return *reinterpret_cast<const float*>(reinterpret_cast<const char*>(tables.codebook) + offset);
}

// Eight consecutive codes of four packed bytes, in the order of the elements: the high nibble of a byte comes first.
__device__ inline void decode_word(const DecodeTables& tables, uint32_t word, float (&value)[8]) {
  value[0] = decode_nibble<4>(tables, word);
  value[1] = decode_nibble<0>(tables, word);
  value[2] = decode_nibble<12>(tables, word);
  value[3] = decode_nibble<8>(tables, word);
  value[4] = decode_nibble<20>(tables, word);
  value[5] = decode_nibble<16>(tables, word);
  value[6] = decode_nibble<28>(tables, word);
  value[7] = decode_nibble<24>(tables, word);
}

// One element by its flattened index, exactly: for shapes that no vector path covers.
__device__ inline float decode_element(const DecodeTables& tables, const Weight& weight, int64_t index, float offset) {
  const uint32_t byte = __ldg(weight.matrix.packed + (index >> 1));
  const uint32_t code = (index & 1) != 0 ? byte & 15u : byte >> 4;
  const float absmax = finish_absmax(tables, weight, load_absmax(weight, index >> weight.blocksize_log2), offset);
  return __fmul_rn(tables.codebook[code], absmax);
}

}  // namespace pyquant::cuda
