// The two 4-bit codebooks, and the thresholds that quantization decides by.
#pragma once

#include "format/quantized_matrix.h"

namespace pyquant {

// NormalFloat4 (Dettmers et al., 2023, QLoRA, appendix E), ascending, as bitsandbytes stores it.
constexpr float kNF4Values[16] = {-1.0f,
                                  -0.6961928009986877f,
                                  -0.5250730514526367f,
                                  -0.39491748809814453f,
                                  -0.28444138169288635f,
                                  -0.18477343022823334f,
                                  -0.09105003625154495f,
                                  0.0f,
                                  0.07958029955625534f,
                                  0.16093020141124725f,
                                  0.24611230194568634f,
                                  0.33791524171829224f,
                                  0.44070982933044434f,
                                  0.5626170039176941f,
                                  0.7229568362236023f,
                                  1.0f};

// FP4: a sign bit and a 3-bit code, in the order of the codes. Code 8 is a second zero, positive in bitsandbytes too.
constexpr float kFP4Values[16] = {0.0f, 0.0625f / 12,  8.0f / 12,  1.0f,  4.0f / 12,  0.5f,  2.0f / 12,  0.25f,
                                  0.0f, -0.0625f / 12, -8.0f / 12, -1.0f, -4.0f / 12, -0.5f, -2.0f / 12, -0.25f};

// The codes of a codebook in ascending order of value. Of FP4's two zeros, 0 comes before 8: a value just above zero
// becomes 8, zero itself 0.
constexpr uint8_t kNF4Order[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
constexpr uint8_t kFP4Order[16] = {11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3};

// A normalised value v gets the code kOrder[number of thresholds t with v > t]; threshold i is the midpoint, in
// float32, of the ascending values i and i + 1.
struct Thresholds {
  float value[15];
};

constexpr Thresholds midpoints(const float (&values)[16], const uint8_t (&order)[16]) {
  Thresholds result{};
  for (int i = 0; i < 15; ++i) result.value[i] = (values[order[i]] + values[order[i + 1]]) / 2;
  return result;
}

constexpr Thresholds kNF4Thresholds = midpoints(kNF4Values, kNF4Order);
constexpr Thresholds kFP4Thresholds = midpoints(kFP4Values, kFP4Order);

// Normalisation never divides by less: bitsandbytes' guard against an all-zero block. Full blocks keep their true
// absmax beside it; a partial last block stores the guarded one.
constexpr float kMinAbsmax = 1e-38f;

}  // namespace pyquant
