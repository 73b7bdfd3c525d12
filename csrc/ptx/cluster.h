// What compute capability 9.0 added to launches: programmatic dependent launch, and clusters of blocks that reach into
// each other's shared memory. In code for earlier ones nothing overlaps, and a cluster is a single block.
#pragma once

#include <cstdint>

#include "ptx/async_copy.h"

namespace pyquant::ptx {

// Returns when the stream's previous kernel is complete and its writes are visible. A kernel launched early calls this
// in every thread that touches memory which that kernel, or one before it, may write or read.
__device__ inline void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the stream's next kernel start, if it is launched early, once every block has called this or ended. Only after
// wait_for_previous_kernel: the next kernel then knows that all kernels but this one are complete.
__device__ inline void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// This block's number within its cluster.
__device__ inline uint32_t cluster_rank() {
  uint32_t rank = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}

__device__ inline uint32_t cluster_size() {
  uint32_t size = 1;
#if __CUDA_ARCH__ >= 900
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
#endif
  return size;
}

// A barrier for all threads of the cluster in two halves. Writes before arrive_cluster, also to other blocks' shared
// memory, are visible after wait_cluster. Each warp calls both with all its lanes.
__device__ inline void arrive_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}

__device__ inline void wait_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}

// Writes `value` where block `rank` of the cluster has what this block has at `shared`. That block must have started
// (a barrier of the cluster shows it), and must not end before it is written to.
__device__ inline void store_to_rank(float* shared, uint32_t rank, float value) {
#if __CUDA_ARCH__ >= 900
  uint32_t address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(shared)), "r"(rank));
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
#else
  *shared = value;
#endif
}

}  // namespace pyquant::ptx
