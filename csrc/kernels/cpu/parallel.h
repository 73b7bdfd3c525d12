// The kernels' only view of a thread pool. The op library installs torch's at load; a program without torch (a
// kernel's own benchmark, say) gets a serial loop.
#pragma once

#include <cstdint>
#include <type_traits>

namespace pyquant::cpu {

using ParallelBody = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain, ParallelBody body, void* context);

void set_parallel_for(ParallelFor implementation, int (*num_threads)());
int num_threads();

namespace detail {
ParallelFor current_parallel_for();
}

// Calls f(begin, end) over disjoint ranges that cover [0, size), ranges of at least `grain` where there are more.
template <typename F>
void parallel_for(int64_t size, int64_t grain, const F& f) {
  if (size <= 0) return;
  detail::current_parallel_for()(
      0, size, grain, [](int64_t begin, int64_t end, void* context) { (*static_cast<const F*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

}  // namespace pyquant::cpu
