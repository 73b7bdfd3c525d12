// Packing that does not depend on the tile: rows of dense operands and of weights, as floats or in bfloat16, dropout
// applied. Internal linkage throughout (isa.h).
#pragma once

#include "kernels/cpu/decode.h"
#include "kernels/cpu/dropout.h"
#include "kernels/cpu/gemm.h"

namespace pyquant::cpu {
namespace {

constexpr int64_t kRowChunk = 512;  // the longest row slice that a packing routine asks for at once

inline void apply(uint32_t mask, float& value) { value = float_of(bits_of(value) & mask); }
inline void apply(uint32_t mask, BFloat16& value) { value.bits &= static_cast<uint16_t>(mask); }

// Zeroes what dropout drops of values[count], of elements from `index` on.
template <typename T>
void drop_row(const Dropout& dropout, int64_t index, int64_t count, T* values) {
  const DropoutMasks masks_for = dropout_masks();
  uint32_t masks[kRowChunk];
  for (int64_t done = 0; done < count; done += kRowChunk) {
    const int64_t n = smaller(kRowChunk, count - done);
    masks_for(static_cast<uint64_t>(*dropout.seed), dropout.threshold, static_cast<uint64_t>(index + done), n, masks);
    for (int64_t i = 0; i < n; ++i) apply(masks[i], values[done + i]);
  }
}

[[maybe_unused]] inline void load_stored(const Dense& m, int64_t offset, int64_t count, float* to) {
  load_row(m.dtype, m.data, offset, count, to);
}
[[maybe_unused]] inline void load_stored(const Dense& m, int64_t offset, int64_t count, BFloat16* to) {
  std::memcpy(to, static_cast<const BFloat16*>(m.data) + offset, count * sizeof(BFloat16));
}

// Elements [start, start + count) of a stored row.
template <typename T>
void load_dense(const Dense& m, int64_t row, int64_t start, int64_t count, T* to) {
  const int64_t offset = row * m.stride + start;
  load_stored(m, offset, count, to);
  if (m.dropout != nullptr) drop_row(*m.dropout, offset, count, to);
}

[[maybe_unused]] inline void drop(const Dropout& dropout, int64_t index, int64_t count, float* c) {
  drop_row(dropout, index, count, c);
  for (int64_t i = 0; i < count; ++i) c[i] *= dropout.scale;
}

[[maybe_unused]] inline void finish(float* c, int64_t count, float scale, DType dtype, const void* bias, int64_t first,
                                    void* to, int64_t offset) {
  if (scale != 1.0f) {
    for (int64_t i = 0; i < count; ++i) c[i] *= scale;
  }
  if (bias != nullptr) {
    float values[kRowChunk];
    for (int64_t done = 0; done < count; done += kRowChunk) {
      const int64_t n = smaller(kRowChunk, count - done);
      load_row(dtype, bias, first + done, n, values);
      for (int64_t i = 0; i < n; ++i) c[done + i] += values[i];
    }
  }
  store_row(dtype, c, count, to, offset);
}

}  // namespace
}  // namespace pyquant::cpu
