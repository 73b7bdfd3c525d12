// masks[i] = all ones where element index + i is kept, else zero.
#pragma once

#include "format/philox.h"

namespace pyquant::cpu {

using DropoutMasks = void (*)(uint64_t seed, uint32_t threshold, uint64_t index, int64_t count, uint32_t* masks);

void dropout_masks_avx512(uint64_t seed, uint32_t threshold, uint64_t index, int64_t count, uint32_t* masks);

// For this processor.
DropoutMasks dropout_masks();

}  // namespace pyquant::cpu
