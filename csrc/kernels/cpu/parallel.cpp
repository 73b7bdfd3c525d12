#include "kernels/cpu/parallel.h"

#include <atomic>

namespace pyquant::cpu {
namespace {

void serial_for(int64_t begin, int64_t end, int64_t, ParallelBody body, void* context) { body(begin, end, context); }

int one_thread() { return 1; }

std::atomic<ParallelFor> installed_for{serial_for};
std::atomic<int (*)()> installed_num_threads{one_thread};

}  // namespace

void set_parallel_for(ParallelFor implementation, int (*num_threads)()) {
  installed_for.store(implementation);
  installed_num_threads.store(num_threads);
}

int num_threads() { return installed_num_threads.load()(); }

namespace detail {
ParallelFor current_parallel_for() { return installed_for.load(); }
}  // namespace detail

}  // namespace pyquant::cpu
