// A large output that the allocator has just mapped costs a page fault every 4 KiB, which can take longer than writing
// it. This asks for huge pages where the operating system gives them on request; elsewhere it does nothing.
#pragma once

#include <cstddef>

namespace pyquant::cpu {

void prefer_huge_pages(void* data, size_t bytes);

}  // namespace pyquant::cpu
