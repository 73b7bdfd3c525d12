// Dropout without a stored mask: whether an element is kept is a pure function of (seed, element index), so that the
// backward pass regenerates the forward's mask. Philox4x32-10 (Salmon et al., 2011, "Parallel random numbers: as easy
// as 1, 2, 3").
#pragma once

#include "format/quantized_matrix.h"

namespace pyquant {

struct Philox4 {
  uint32_t lane[4];
};

PYQUANT_HOST_DEVICE inline Philox4 philox(uint64_t seed, uint64_t counter) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  Philox4 c{{static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), 0u, 0u}};
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = 0xD2511F53ull * c.lane[0];
    const uint64_t product1 = 0xCD9E8D57ull * c.lane[2];
    c = Philox4{{static_cast<uint32_t>(product1 >> 32) ^ c.lane[1] ^ key0, static_cast<uint32_t>(product1),
                 static_cast<uint32_t>(product0 >> 32) ^ c.lane[3] ^ key1, static_cast<uint32_t>(product0)}};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return c;
}

// Dropout of an [m, k] operand. Element i of the flattened operand draws lane i % 4 of counter i / 4 and is dropped
// when the draw is below `threshold`; kept elements are multiplied by `scale` = 1 / (1 - p).
struct Dropout {
  const int64_t* seed;  // [1], on the kernel's device: a CUDA graph replays with the seed it finds there
  uint32_t threshold;   // p · 2³²
  float scale;

  PYQUANT_HOST_DEVICE bool active() const { return seed != nullptr; }
};

PYQUANT_HOST_DEVICE inline bool dropout_keeps(uint64_t seed, uint32_t threshold, uint64_t index) {
  return philox(seed, index / 4).lane[index % 4] >= threshold;
}

}  // namespace pyquant
