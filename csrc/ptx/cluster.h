// What compute capability 9.0 added to launches: programmatic dependent launch, and clusters of blocks that reach into
// each other's shared memory. In code for earlier ones nothing overlaps, and a cluster is a single block.
#pragma once

#include <cstdint>

#include "ptx/async_copy.h"
#include "ptx/barrier.h"

namespace pyquant::ptx {

// Returns when the stream's previous kernel is complete and its writes are visible. A kernel launched early calls this
// in every thread that touches memory which that kernel, or one before it, may write or read, and reads it by plain
// loads: __ldg and const __restrict__ take what they load for constant while the kernel runs.
// Parameters::beside in linear_wgmma.cu and beside_previous in lora_wgmma.cu are the exceptions.
__device__ inline void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the stream's next kernel start, if it is launched early, once every block has called this or ended. Only after
// wait_for_previous_kernel: the next kernel then knows that all kernels but this one are complete. The launches
// that set LowRank::begun are the exception.
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

// The cluster's number in the grid, and how many there are, along x.
__device__ inline int cluster_id() {
  int id = static_cast<int>(blockIdx.x);
#if __CUDA_ARCH__ >= 900
  asm volatile("mov.u32 %0, %%clusterid.x;" : "=r"(id));
#endif
  return id;
}

__device__ inline int clusters() {
  int count = static_cast<int>(gridDim.x);
#if __CUDA_ARCH__ >= 900
  asm volatile("mov.u32 %0, %%nclusterid.x;" : "=r"(count));
#endif
  return count;
}

// A barrier for all threads of the cluster in two halves: what was written before arrive_cluster, also to other blocks'
// shared memory, is visible after wait_cluster. Each warp calls both with all its lanes.
__device__ inline void arrive_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}

// arrive_cluster for barriers only, which fence_barrier_init has made visible: it does not wait for other writes.
__device__ inline void arrive_cluster_relaxed() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}

__device__ inline void wait_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}

// Where block `rank` of the cluster has what this block has at `address`.
__device__ inline uint32_t address_in_rank(uint32_t address, uint32_t rank) {
  uint32_t result = address;
#if __CUDA_ARCH__ >= 900
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(result) : "r"(address), "r"(rank));
#endif
  return result;
}

// What a block of the cluster expects from others: a number of bytes, counted by a barrier in its shared memory. One
// thread of the block expects; a barrier of the cluster follows; then any block may send, and ends when it likes; what
// threads of the receiving block need the bytes wait. Once in a kernel, and to send is an illegal instruction in a
// kernel that was not launched with clusters of 2 or more. Nothing below compute capability 9.0, where no cluster has a
// sender.
__device__ inline void expect_from_cluster(uint64_t* barrier, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  init_barrier(barrier, 1);
  fence_barrier_init();
  expect_bytes(barrier, bytes);
#endif
}

// `value` to a place of another block, counted by a barrier there; both are address_in_rank.
__device__ inline void send(uint32_t address, uint32_t barrier, float value) {
#if __CUDA_ARCH__ >= 900
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(address),
               "r"(__float_as_uint(value)), "r"(barrier)
               : "memory");
#endif
}
__device__ inline void send(uint32_t address, uint32_t barrier, float2 value) {
#if __CUDA_ARCH__ >= 900
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::"r"(address),
               "r"(__float_as_uint(value.x)), "r"(__float_as_uint(value.y)), "r"(barrier)
               : "memory");
#endif
}
__device__ inline void send(uint32_t address, uint32_t barrier, float4 value) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(address),
      "r"(__float_as_uint(value.x)), "r"(__float_as_uint(value.y)), "r"(__float_as_uint(value.z)),
      "r"(__float_as_uint(value.w)), "r"(barrier)
      : "memory");
#endif
}

// `value` to where block `rank` has what this block has at `shared`, counted by its `barrier`.
template <typename Value>
__device__ inline void send_to_rank(float* shared, uint64_t* barrier, uint32_t rank, Value value) {
  send(address_in_rank(shared_address(shared), rank), address_in_rank(shared_address(barrier), rank), value);
}

__device__ inline void wait_for_cluster(uint64_t* barrier) {
#if __CUDA_ARCH__ >= 900
  wait_barrier(barrier, 0);
#endif
}

// Arrives at the barrier that block `rank` has where this block has `barrier`: a sign that this thread has read what
// gave `value`, and nothing else. (Releasing writes as well would wait for all of them to reach memory.)
__device__ inline void arrive_at_rank(uint64_t* barrier, uint32_t rank, float value) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n"
      ".reg .b32 address;\n"
      "mapa.shared::cluster.u32 address, %0, %1;\n"
      "mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [address];\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(rank), "f"(value)
      : "memory");
#endif
}

}  // namespace pyquant::ptx
