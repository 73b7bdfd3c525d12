// Dropout masks inside kernels, from philox.h's definition, without indexing registers dynamically.
#pragma once

#include "format/philox.h"

namespace pyquant::cuda {

__device__ inline uint32_t select_lane(const Philox4& draws, uint32_t lane) {
  const uint32_t low = (lane & 1u) != 0 ? draws.lane[1] : draws.lane[0];
  const uint32_t high = (lane & 1u) != 0 ? draws.lane[3] : draws.lane[2];
  return (lane & 2u) != 0 ? high : low;
}

// Whether element `index` of the flattened operand is kept.
__device__ inline bool keeps(uint64_t seed, uint32_t threshold, int64_t index) {
  return select_lane(philox(seed, static_cast<uint64_t>(index) / 4), static_cast<uint32_t>(index) % 4) >= threshold;
}

// Bit e of the result: whether element index + e is kept, for the 8 elements from `index`, a multiple of 4.
__device__ inline uint32_t keeps_8(uint64_t seed, uint32_t threshold, int64_t index) {
  uint32_t mask = 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const Philox4 draws = philox(seed, static_cast<uint64_t>(index) / 4 + half);
#pragma unroll
    for (int i = 0; i < 4; ++i) mask |= (draws.lane[i] >= threshold ? 1u : 0u) << (4 * half + i);
  }
  return mask;
}

}  // namespace pyquant::cuda
