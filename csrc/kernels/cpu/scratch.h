// Working memory of one thread, kept between calls and grown when a call needs more.
#pragma once

#include <cstddef>

namespace pyquant::cpu {

// Two different `slot`s (0 to 3) never share memory. Aligned to a cache line; the contents are unspecified.
void* scratch(int slot, size_t bytes);

}  // namespace pyquant::cpu
