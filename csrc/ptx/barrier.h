// mbarriers: counters in shared memory on which copies by the tensor memory accelerator complete (sm_90 and later). By
// address, or where they are declared by pointer.
#pragma once

#include <cstdint>

#include "ptx/async_copy.h"

namespace pyquant::ptx {

__device__ inline void init_barrier(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ inline void init_barrier(uint64_t* barrier, uint32_t arrivals) {
  init_barrier(shared_address(barrier), arrivals);
}

// Makes initialised barriers visible to the accelerator, and to the other blocks of a cluster.
__device__ inline void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Arrives, and lets the phase complete only after that many bytes have been copied.
__device__ inline void expect_bytes(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ inline void expect_bytes(uint64_t* barrier, uint32_t bytes) { expect_bytes(shared_address(barrier), bytes); }

__device__ inline void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ inline void arrive(uint64_t* barrier) { arrive(shared_address(barrier)); }

// What all lanes of a warp have read or written is done: kWarpArrivals arrivals. One lane arrives for all, as
// __syncwarp orders their accesses before its own. compute-sanitizer's racecheck does not follow that; in a build for
// it (PYQUANT_RACECHECK) every lane arrives.
#ifdef PYQUANT_RACECHECK
constexpr int kWarpArrivals = 32;
__device__ inline void arrive_for_warp(uint32_t barrier) { arrive(barrier); }
#else
constexpr int kWarpArrivals = 1;
__device__ inline void arrive_for_warp(uint32_t barrier) {
  __syncwarp();
  asm volatile(
      "{\n"
      ".reg .pred elected;\n"
      "elect.sync _|elected, 0xFFFFFFFF;\n"
      "@elected mbarrier.arrive.shared::cta.b64 _, [%0];\n"
      "}" ::"r"(barrier)
      : "memory");
}
#endif

// Waits for the end of the phase of that parity.
__device__ inline void wait_barrier(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "WAIT_%=:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra WAIT_%=;\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
__device__ inline void wait_barrier(uint64_t* barrier, uint32_t parity) {
  wait_barrier(shared_address(barrier), parity);
}

// Whether it has ended.
__device__ inline bool test_barrier(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n.reg .pred done;\nmbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\nselp.u32 %0, 1, 0, done;\n}"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done != 0;
}

// Words in global memory between kernels that run at the same time.
__device__ inline void store_word(uint32_t* word, uint32_t value) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(word), "r"(value) : "memory");
}
__device__ inline uint32_t load_acquire(const uint32_t* word) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
  return value;
}

}  // namespace pyquant::ptx
