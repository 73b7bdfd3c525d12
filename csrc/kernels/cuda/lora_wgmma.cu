// The products of a LoRA adapter for many rows on Hopper (sm_90a): lora.cu's, by wgmma with both operands from shared
// memory.
//
// A block computes 64 × 64 of the output in steps of 64 along the reduction. One thread has the accelerator copy both
// operands, some steps ahead; a warpgroup multiplies. wgmma takes either operand along the reduction or across it, so
// that x·Aᵀ, dy·B, dyaᵀ·x and dyᵀ·xa are the same kernel. Columns beyond the rank arrive as zeros. All four are bound
// by reading the large operand: where tiles are too few to keep memory busy, the blocks of a cluster share the
// reduction of one, send each other their parts of its rows, and each adds up its share in order.
//
// Or, for x·Aᵀ and dy·B beside the linear that needs them last (LinearPlan::beside): as few blocks as finish in time,
// of up to four warpgroups for 64 rows each, on the multiprocessors that the linear leaves free. They let it start
// before they wait for the kernels before, so that its own beginning is over by then, and tell it in a word of memory
// when that wait is.
#include <algorithm>
#include <atomic>
#include <mutex>

#include "kernels/cuda/element.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/lora_kernels.h"
#include "kernels/cuda/tensor_map.h"
#include "ptx/cluster.h"
#include "ptx/shared_memory.h"
#include "ptx/tma.h"
#include "ptx/wgmma.h"

namespace pyquant::cuda {
namespace {

constexpr int kTile = 64;  // of the output's two sizes, and of a step
constexpr int kOperandBytes = kTile * kTile * 2;
constexpr unsigned kLargestCluster = 8;
constexpr int kInboxRow = kTile + 4;  // floats: neither rows nor columns meet more than twice in a bank

// By the number of warpgroups that multiply.
template <int kGroups>
struct Layout {
  static constexpr int kStages = 5;  // two blocks of one group fit an SM, and one of four
  static constexpr int kConsumers = 128 * kGroups, kThreads = kConsumers + 32;
  static constexpr int kLargeBytes = kGroups * kOperandBytes, kStageBytes = kLargeBytes + kOperandBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes + 1024;  // to align it
};

// Words for `begun`. Launches that are not captured take them in turn: far more than can be in flight.
constexpr uint32_t kTurns = 1 << 14, kWords = 1 << 17;
__device__ uint32_t words[kWords];

struct Parameters {
  CUtensorMap large, small;
  SkinnyOutput output;
  int steps, rank_tiles;
  int stage_bytes;  // that are copied
  bool beside_previous;
  bool early;       // lets the next kernel start before it waits
  uint32_t* begun;  // and sets this, or null
  int parts;        // blocks of a cluster that share a tile, or 1, and then a cluster is only to lie side by side
};

// kLargeByStep: the large operand is [reduction, outer], else [outer, reduction]; kSmallByStep: the small one is
// [reduction, rank], else [rank, reduction].
template <typename T, bool kLargeByStep, bool kSmallByStep, int kGroups>
__global__ void __launch_bounds__(Layout<kGroups>::kThreads) lora_wgmma_kernel(const __grid_constant__ Parameters p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using L = Layout<kGroups>;
  constexpr int kStages = L::kStages, kConsumers = L::kConsumers;
  static_assert(kGroups == 1 || !kLargeByStep);
  extern __shared__ __align__(1024) unsigned char dynamic_shared[];
  // [block][row of this block's share][column]
  __shared__ alignas(8) float inbox[kGroups == 1 ? kTile * kInboxRow : 1];
  __shared__ alignas(8) uint64_t full[kStages], empty[kStages], received;
  const uint32_t stages = (ptx::shared_address(dynamic_shared) + 1023) & ~1023u;
  const auto large_at = [stages](int stage) { return stages + stage * L::kStageBytes; };
  const auto small_at = [stages](int stage) { return stages + stage * L::kStageBytes + L::kLargeBytes; };

  const int parts = kGroups == 1 ? p.parts : 1, part = parts > 1 ? static_cast<int>(ptx::cluster_rank()) : 0;
  const int tile = static_cast<int>(blockIdx.x) / parts;
  const int outer0 = tile / p.rank_tiles * kGroups * kTile, rank0 = tile % p.rank_tiles * kTile;
  if (outer0 >= p.output.outer) return;  // only there to complete a cluster
  const int first = p.steps * part / parts, steps = p.steps * (part + 1) / parts - first;
  const int columns = min(kTile, static_cast<int>(p.output.rank) - rank0 + 7 & ~7);  // that are sent
  const int rows = kTile / parts;                                                    // of this block's share
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::init_barrier(&full[stage], 1);
      ptx::init_barrier(&empty[stage], kConsumers / 32);
    }
    ptx::init_barrier(&received, 1);
    ptx::fence_barrier_init();
    if (parts > 1) ptx::expect_bytes(&received, parts * rows * columns * 4);
    // The word may be left over from an earlier launch. It is in place before this block lets the linear start.
    if (p.begun != nullptr && blockIdx.x == 0) ptx::store_word(p.begun, 0), __threadfence();
  } else if (threadIdx.x == kConsumers) {
    ptx::prefetch_tensor_map(&p.large);
    ptx::prefetch_tensor_map(&p.small);
  }
  __syncthreads();
  if (parts > 1) ptx::arrive_cluster_relaxed();
  if (p.early) {
    ptx::let_next_kernel_start();
    ptx::wait_for_previous_kernel();
    // Without releasing: what the kernels before wrote is where the linear looks, in L2, or that wait had not ended. A
    // release would take as long as the linear's first activations do.
    if (p.begun != nullptr && blockIdx.x == 0 && threadIdx.x == 0) ptx::store_word(p.begun, 1);
  } else if (!p.beside_previous) {
    ptx::wait_for_previous_kernel(), ptx::let_next_kernel_start();
  }
  // Beside the previous kernel, this one ends after it all the same: who waits for this one waits for both.
  const auto end = [&] {
    if (p.beside_previous) ptx::wait_for_previous_kernel(), ptx::let_next_kernel_start();
  };

  if (threadIdx.x >= kConsumers) {
    if (threadIdx.x == kConsumers) {
      for (int step = 0; step < steps; ++step) {
        const int stage = step % kStages, at = (first + step) * kTile;
        const uint32_t barrier = ptx::shared_address(&full[stage]);
        ptx::wait_barrier(&empty[stage], step / kStages & 1 ^ 1);
        ptx::expect_bytes(barrier, p.stage_bytes);
        ptx::copy_tile(large_at(stage), &p.large, kLargeByStep ? outer0 : at, kLargeByStep ? at : outer0, barrier);
        ptx::copy_tile(small_at(stage), &p.small, kSmallByStep ? rank0 : at, kSmallByStep ? at : rank0, barrier);
      }
    }
    __syncwarp();
    if (parts > 1) ptx::wait_cluster();
    return end();
  }

  const int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  float sum[kTile / 2] = {};
  for (int step = 0; step < steps; ++step) {
    const int stage = step % kStages;
    ptx::wait_barrier(&full[stage], step / kStages & 1);
    // 16 along the reduction are 32 bytes of a row, or 16 rows of 128.
    const uint32_t a = ptx::operand_128(large_at(stage) + group * kOperandBytes), b = ptx::operand_128(small_at(stage));
    ptx::fence_products();
#pragma unroll
    for (int chunk = 0; chunk < 4; ++chunk) {
      ptx::multiply<T, kTile, kLargeByStep, kSmallByStep>(sum, a + chunk * (kLargeByStep ? 128 : 2),
                                                          b + chunk * (kSmallByStep ? 128 : 2));
    }
    ptx::commit_products();
    ptx::wait_products<1>();
    if (step > 0 && threadIdx.x % 32 == 0) ptx::arrive(&empty[(step - 1) % kStages]);
  }
  ptx::wait_products<0>();
  ptx::hold_sums(sum);

  if (parts > 1) ptx::wait_cluster();  // the other blocks' barriers are ready
#pragma unroll
  for (int j = 0; j < kTile / 8; ++j) {
    if (8 * j >= columns) break;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = 16 * warp + g + 8 * half, column = 8 * j + 2 * t;
      const float2 values = make_float2(sum[4 * j + 2 * half], sum[4 * j + 2 * half + 1]);
      if (parts > 1) {
        const int owner = row / rows;
        ptx::send_to_rank(inbox + (part * rows + row - owner * rows) * kInboxRow + column, &received, owner, values);
      } else {
        store_skinny<T>(p.output, outer0 + group * kTile + row, rank0 + column, values.x);
        store_skinny<T>(p.output, outer0 + group * kTile + row, rank0 + column + 1, values.y);
      }
    }
  }
  if (parts == 1) return end();
  ptx::wait_barrier(&received, 0);
  // Along the output's contiguous dimension.
  const bool by_outer = p.output.outer_stride == 1;
  for (int index = threadIdx.x; index < rows * columns; index += kConsumers) {
    const int i = by_outer ? index % rows : index / columns, j = by_outer ? index / rows : index % columns;
    float total = 0.0f;
    for (int from = 0; from < parts; ++from) total += inbox[(from * rows + i) * kInboxRow + j];
    store_skinny<T>(p.output, outer0 + part * rows + i, rank0 + j, total);
  }
  end();
#else
  __trap();  // launched only where there is code for sm_90a
#endif
}

template <typename T, bool kLargeByStep, bool kSmallByStep, int kGroups>
const uint32_t* launch(const char* name, const std::string& problem, const SkinnyProblem& s, cudaStream_t stream) {
  using L = Layout<kGroups>;
  constexpr CUtensorMapDataType kElement =
      std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const auto map = [&](const void* data, bool by_step, int64_t size, int rows_of_tile) {
    const int64_t rows = by_step ? s.reduction : size, columns = by_step ? size : s.reduction;
    return make_tensor_map(data, kElement, rows, columns, columns * 2, rows_of_tile, kTile, CU_TENSOR_MAP_SWIZZLE_128B);
  };
  // The accelerator takes as long for a row of zeros as for one it reads: none beyond the rank, where that is rows.
  // What stands there then is multiplied all the same, and not stored.
  const int small_rows =
      kSmallByStep ? kTile : static_cast<int>(std::min<int64_t>(kTile, ceil_div(s.output.rank, 8) * 8));
  Parameters p{};
  p.large = map(s.large, kLargeByStep, s.output.outer, kGroups * kTile);
  p.small = map(s.small, kSmallByStep, s.output.rank, small_rows);
  p.stage_bytes = L::kLargeBytes + small_rows * kTile * 2;
  p.output = s.output;
  p.steps = static_cast<int>(ceil_div(s.reduction, kTile));
  p.rank_tiles = static_cast<int>(ceil_div(s.output.rank, kTile));
  p.beside_previous = s.beside_previous;
  p.begun = s.beside_rows > 0 && s.begun == nullptr ? next_word(stream) : nullptr;
  p.early = p.begun != nullptr || s.begun != nullptr;
  p.parts = 1;
  const auto kernel = lora_wgmma_kernel<T, kLargeByStep, kSmallByStep, kGroups>;
  allow_shared_memory(reinterpret_cast<const void*>(kernel), name, L::kSharedBytes);
  int64_t blocks = ceil_div(s.output.outer, kGroups * kTile) * p.rank_tiles;
  unsigned cluster = 1;
  if (s.beside_rows > 0) {
    // A cluster leaves room for whole clusters.
    cluster = static_cast<unsigned>(s.beside_cluster);
    blocks = ceil_div(blocks, int64_t{cluster}) * cluster;
  } else {
    // A block on every SM, or on half of them for the two gradients, which run side by side; each with four steps or
    // more. (Two blocks may fit an SM, but then twice as much is exchanged.)
    const int64_t room = current_device().sm_count / (kLargeByStep ? 2 : 1);
    while (2 * cluster <= kLargestCluster && blocks * cluster * 2 <= room && p.steps >= static_cast<int>(8 * cluster)) {
      cluster *= 2;
    }
    p.parts = static_cast<int>(cluster);
    blocks *= cluster;
  }
  const Launch shape{grid_size(blocks, name), L::kThreads, L::kSharedBytes, stream, cluster, true};
  launch_kernel(name, problem, shape, kernel, p);
  return s.begun != nullptr ? s.begun : p.begun;
}

template <typename T, bool kSmallByStep>
const uint32_t* launch_groups(const char* name, const std::string& problem, const SkinnyProblem& s,
                              cudaStream_t stream) {
  switch (s.beside_rows) {
    case 256:
      return launch<T, false, kSmallByStep, 4>(name, problem, s, stream);
    case 128:
      return launch<T, false, kSmallByStep, 2>(name, problem, s, stream);
    default:
      return launch<T, false, kSmallByStep, 1>(name, problem, s, stream);
  }
}

}  // namespace

uint32_t* next_word(cudaStream_t stream) {
  struct OfDevice {
    std::once_flag known;
    uint32_t* words = nullptr;
    std::atomic<uint32_t> turn{0}, captured{kTurns};
  };
  static OfDevice devices[kMaxDevices];
  OfDevice& device = devices[current_device().index];
  std::call_once(device.known, [&] {
    void* address = nullptr;
    if (cudaGetSymbolAddress(&address, words) == cudaSuccess) device.words = static_cast<uint32_t*>(address);
  });
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (device.words == nullptr || cudaStreamIsCapturing(stream, &status) != cudaSuccess) {
    cudaGetLastError();  // the linear starts later, that is all
    return nullptr;
  }
  if (status == cudaStreamCaptureStatusNone) return device.words + device.turn++ % kTurns;
  if (device.captured >= kWords) return nullptr;
  const uint32_t index = device.captured++;
  return index < kWords ? device.words + index : nullptr;
}

std::optional<const uint32_t*> lora_wgmma(const char* name, const std::string& problem, DType dtype, bool large_by_step,
                                          bool small_by_step, const SkinnyProblem& s, cudaStream_t stream) {
  // The accelerator wants rows of multiples of 16 bytes.
  const int64_t large_row = large_by_step ? s.output.outer : s.reduction;
  const int64_t small_row = small_by_step ? s.output.rank : s.reduction;
  constexpr int64_t kLimit = int64_t{1} << 30;
  if (!has_sm_90a_code() || dtype == DType::kFloat32 || large_row % 8 != 0 || small_row % 8 != 0 ||
      !aligned_16(s.large) || !aligned_16(s.small) || s.output.rank <= 0 ||
      std::max({s.reduction, s.output.outer, s.output.rank}) >= kLimit) {
    return std::nullopt;
  }
  const uint32_t* begun = nullptr;
  with_half_type(dtype, [&](auto element) {
    using T = decltype(element);
    if (large_by_step) {
      begun = launch<T, true, true, 1>(name, problem, s, stream);
    } else {
      begun = small_by_step ? launch_groups<T, true>(name, problem, s, stream)
                            : launch_groups<T, false>(name, problem, s, stream);
    }
  });
  return begun;
}

}  // namespace pyquant::cuda
