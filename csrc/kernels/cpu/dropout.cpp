#include "kernels/cpu/dropout.h"

#include "kernels/cpu/isa.h"

namespace pyquant::cpu {
namespace {

void dropout_masks_portable(uint64_t seed, uint32_t threshold, uint64_t index, int64_t count, uint32_t* masks) {
  for (int64_t i = 0; i < count;) {
    const Philox4 draws = philox(seed, (index + i) / 4);
    for (uint64_t lane = (index + i) % 4; lane < 4 && i < count; ++lane, ++i) {
      masks[i] = draws.lane[lane] >= threshold ? ~0u : 0u;
    }
  }
}

}  // namespace

DropoutMasks dropout_masks() {
#if PYQUANT_X86
  if (isa() >= Isa::kAvx512) return dropout_masks_avx512;
#endif
  return dropout_masks_portable;
}

}  // namespace pyquant::cpu
