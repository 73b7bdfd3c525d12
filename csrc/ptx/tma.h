// Tiles through the tensor memory accelerator (sm_90 and later), and barriers of other blocks of a cluster.
#pragma once

#include <cstdint>

#include "ptx/barrier.h"

namespace pyquant::ptx {

// Copies the box of a two-dimensional tensor map that begins at (row, column) to `destination`, zeros where it leaves
// the tensor, and completes on `barrier`.
__device__ inline void copy_tile(uint32_t destination, const void* tensor_map, int column, int row, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          destination),
      "l"(tensor_map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}

// The same for bytes that are read once: they leave the L2 cache first.
__device__ inline void copy_tile_once(void* destination, const void* tensor_map, int column, int row,
                                      uint64_t* barrier) {
  constexpr uint64_t kEvictFirst = 0x12F0000000000000;
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(destination)),
      "l"(tensor_map), "r"(column), "r"(row), "r"(shared_address(barrier)), "l"(kEvictFirst)
      : "memory");
}

// copy_tile to this place and this barrier of every block of the cluster whose bit is set in `ranks`.
__device__ inline void copy_tile_to_ranks(uint32_t destination, const void* tensor_map, int column, int row,
                                          uint32_t barrier, uint16_t ranks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(destination),
      "l"(tensor_map), "r"(column), "r"(row), "r"(barrier), "h"(ranks)
      : "memory");
}

// The other way: a box in shared memory, written by threads that then called fence_async_proxy, to the tensor, but for
// what leaves it. Completes with the calling thread's groups of stores.
__device__ inline void store_tile(const void* tensor_map, int column, int row, uint32_t source) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];\n"
      "cp.async.bulk.commit_group;" ::"l"(tensor_map),
      "r"(column), "r"(row), "r"(source)
      : "memory");
}

__device__ inline void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// What this thread knows to be written to global memory is seen by the copies it starts from now on.
__device__ inline void fence_async_proxy_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// Waits until all but kPending of the thread's stores have read their source.
template <int kPending>
__device__ inline void wait_stores_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// Waits until the thread's stores are complete.
__device__ inline void wait_stores() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

__device__ inline void prefetch_tensor_map(const void* tensor_map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(tensor_map) : "memory");
}

// `barrier` is an address_in_rank. Without a fence of the cluster's memory: meant for arrivals that say "read", not
// "written".
__device__ inline void arrive_in_rank(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

}  // namespace pyquant::ptx
