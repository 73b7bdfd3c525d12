// The products of a LoRA adapter around the 4-bit linear: x·Aᵀ, dy·B and the gradients of A and B. All four are skinny,
// with the rank as one dimension of the output, and bound by reading the one large activation.
#include <algorithm>
#include <type_traits>

#include "kernels/cuda/kernels.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/linear_kernels.h"
#include "kernels/cuda/lora_kernels.h"
#include "kernels/cuda/tile.h"
#include "ptx/cluster.h"

namespace pyquant::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// An output, and where the reduction is split, its parts: [split][outer · rank] in the layout of the output.
struct Output : SkinnyOutput {
  float* partial;
};

template <typename T>
__device__ void store(const Output& output, int part, int64_t i, int64_t j, float value) {
  if (output.partial == nullptr) return store_skinny<T>(output, i, j, value);
  if (i >= output.outer || j >= output.rank) return;
  const int64_t index = i * output.outer_stride + j * output.rank_stride;
  output.partial[part * output.outer * output.rank + index] = value;
}

// --- Tensor cores, 16-bit types ---

// A block computes 32 × kRank of the output in steps of 128 along the reduction, of which each of its 8 warps
// multiplies 16; the warps' sums meet at the end. So many warps to so small a tile keep enough bytes of the large
// operand in flight. Where the tiles are too few for the GPU, the blocks of a cluster share the reduction of one, and
// each adds up what all have of its share of the outputs, in order. Without clusters (code for sm_80), gradients are
// split over gridDim.y and another kernel adds the parts.
constexpr int kOuter = 32;
constexpr int kStep = 128;
constexpr int kStages = 3;
constexpr int kLargestCluster = 8;

// kLargeByStep: the large operand is [reduction, outer], else [outer, reduction]; kSmallByStep: the small one is
// [reduction, rank], else [rank, reduction].
template <bool kLargeByStep, bool kSmallByStep, int kRank>
struct SkinnyTile {
  static constexpr int kLargeRows = kLargeByStep ? kStep : kOuter, kLargeColumns = kLargeByStep ? kOuter : kStep;
  static constexpr int kSmallRows = kSmallByStep ? kStep : kRank, kSmallColumns = kSmallByStep ? kRank : kStep;
  static constexpr int kLargeElements = kLargeRows * padded(kLargeColumns);
  static constexpr int kSmallElements = kSmallRows * padded(kSmallColumns);
  static constexpr int kStageElements = kLargeElements + kSmallElements;
  static constexpr int kPipelineBytes = kStages * kStageElements * 2;
  static constexpr int kSumBytes = kWarps * kOuter * kRank * 4;
  static constexpr int kSharedBytes = kPipelineBytes > kSumBytes ? kPipelineBytes : kSumBytes;
};

template <typename T, bool kLargeByStep, bool kSmallByStep, int kRank>
__global__ void __launch_bounds__(kThreads)
    skinny_mma_kernel(const __grid_constant__ Dense<T> large, const __grid_constant__ Dense<T> small,
                      const __grid_constant__ Dropout dropout, const __grid_constant__ Output output) {
  using Tile = SkinnyTile<kLargeByStep, kSmallByStep, kRank>;
  extern __shared__ __align__(16) unsigned char dynamic_shared[];
  T* stages = reinterpret_cast<T*>(dynamic_shared);
  constexpr int kOutputs = kOuter * kRank;
  __shared__ float inbox[kOutputs];  // of the share of the outputs that this block adds up, the blocks' parts
  __shared__ alignas(8) uint64_t inbox_barrier;
  const uint32_t cluster = ptx::cluster_size(), cluster_part = ptx::cluster_rank();
  if (cluster > 1) {
    if (threadIdx.x == 0) ptx::expect_from_cluster(&inbox_barrier, kOutputs * 4);
    ptx::arrive_cluster();
  }
  ptx::wait_for_previous_kernel();
  ptx::let_next_kernel_start();

  const int64_t reduction = kLargeByStep ? large.rows : large.columns;
  const int64_t all_steps = (reduction + kStep - 1) / kStep;
  const int part = blockIdx.y + cluster_part, parts = gridDim.y * cluster;  // one of the two factors is 1
  const int64_t first_step = all_steps * part / parts, steps = all_steps * (part + 1) / parts - first_step;
  // Blocks with the same part of the large operand are neighbours.
  const int rank_tiles = static_cast<int>((output.rank + kRank - 1) / kRank);
  const uint32_t tile = blockIdx.x / cluster;
  const int64_t outer0 = int64_t{tile / rank_tiles} * kOuter, rank0 = tile % rank_tiles * kRank;
  const uint64_t seed = dropout.active() ? static_cast<uint64_t>(*dropout.seed) : 0;

  const auto start_loads = [&](int64_t step) {
    if (step < steps) {
      T* stage = stages + step % kStages * Tile::kStageElements;
      const int64_t step0 = (first_step + step) * kStep;
      load_tile<Tile::kLargeRows, Tile::kLargeColumns, kThreads>(stage, large, kLargeByStep ? step0 : outer0,
                                                                 kLargeByStep ? outer0 : step0);
      load_tile<Tile::kSmallRows, Tile::kSmallColumns, kThreads>(
          stage + Tile::kLargeElements, small, kSmallByStep ? step0 : rank0, kSmallByStep ? rank0 : step0);
    }
    ptx::commit_copies();  // an empty group at the end keeps the count that wait_copies goes by
  };

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  ptx::FragC sum[kOuter / 16][kRank / 8] = {};
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) start_loads(step);
  for (int64_t step = 0; step < steps; ++step) {
    T* stage = stages + step % kStages * Tile::kStageElements;
    ptx::wait_copies<kStages - 2>();
    if (dropout.active()) {
      const int64_t step0 = (first_step + step) * kStep;
      drop_elements<Tile::kLargeRows, Tile::kLargeColumns, kThreads>(
          stage, large, kLargeByStep ? step0 : outer0, kLargeByStep ? outer0 : step0, seed, dropout.threshold);
    }
    // This stage is complete, and every warp is done with the stage before, which the next loads overwrite.
    __syncthreads();
    start_loads(step + kStages - 1);

    const T* small_tile = stage + Tile::kLargeElements;
    ptx::FragA a[kOuter / 16];
#pragma unroll
    for (int i = 0; i < kOuter / 16; ++i) {
      a[i] = load_a<kLargeByStep>(stage, padded(Tile::kLargeColumns), 16 * i, 16 * warp);
    }
#pragma unroll
    for (int j = 0; j < kRank / 8; j += 2) {
      ptx::FragB b[2];
      load_b<kSmallByStep>(small_tile, padded(Tile::kSmallColumns), 8 * j, 16 * warp, b[0], b[1]);
#pragma unroll
      for (int i = 0; i < kOuter / 16; ++i) {
        ptx::mma<T>(sum[i][j], a[i], b[0]);
        ptx::mma<T>(sum[i][j + 1], a[i], b[1]);
      }
    }
  }

  ptx::wait_copies<0>();
  __syncthreads();  // the stages' memory now holds the warps' sums, [warp][outer][rank]
  float* sums = reinterpret_cast<float*>(dynamic_shared);
#pragma unroll
  for (int i = 0; i < kOuter / 16; ++i) {
#pragma unroll
    for (int j = 0; j < kRank / 8; ++j) {
#pragma unroll
      for (int v = 0; v < 4; v += 2) {
        const int row = 16 * i + lane / 4 + (v >= 2 ? 8 : 0), column = 8 * j + lane % 4 * 2;
        *reinterpret_cast<float2*>(sums + (warp * kOuter + row) * kRank + column) =
            make_float2(sum[i][j].value[v], sum[i][j].value[v + 1]);
      }
    }
  }
  if (cluster > 1) ptx::wait_cluster();  // the other blocks' barriers are ready
  __syncthreads();
  // Outputs are numbered along the contiguous dimension.
  const auto finish = [&](int index, float total) {
    const bool by_outer = output.outer_stride == 1;
    const int i = by_outer ? index % kOuter : index / kRank, j = by_outer ? index / kOuter : index % kRank;
    store<T>(output, blockIdx.y, outer0 + i, rank0 + j, total);
  };
  const int share = kOutputs / cluster;
#pragma unroll 1
  for (int index = threadIdx.x; index < kOutputs; index += kThreads) {
    const bool by_outer = output.outer_stride == 1;
    const int i = by_outer ? index % kOuter : index / kRank, j = by_outer ? index / kOuter : index % kRank;
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += sums[(w * kOuter + i) * kRank + j];
    if (cluster == 1) {
      finish(index, total);
    } else {
      ptx::send_to_rank(&inbox[cluster_part * share + index % share], &inbox_barrier, index / share, total);
    }
  }
  if (cluster == 1) return;
  ptx::wait_for_cluster(&inbox_barrier);
  for (int index = threadIdx.x; index < share; index += kThreads) {
    float total = 0.0f;
    for (uint32_t from = 0; from < cluster; ++from) total += inbox[from * share + index];
    finish(cluster_part * share + index, total);
  }
}

// Whether blocks of these kernels can form clusters.
bool skinny_clusters() {
  return current_device().arch >= 90 &&
         has_sm_90_code(reinterpret_cast<const void*>(skinny_mma_kernel<__half, true, true, 16>));
}

// Blocks of a cluster: enough to fill the GPU a few times over, each with at least four steps.
unsigned skinny_cluster(int64_t tiles, int64_t reduction) {
  unsigned cluster = 1;
  while (2 * cluster <= kLargestCluster && tiles * cluster < 3 * current_device().sm_count &&
         ceil_div(reduction, kStep) >= 8 * cluster) {
    cluster *= 2;
  }
  return cluster;
}

template <typename T, bool kLargeByStep, bool kSmallByStep, int kRank>
void launch_skinny_mma(const char* name, const std::string& problem, const Dense<T>& large, const Dense<T>& small,
                       const Dropout& dropout, const Output& output, int split, cudaStream_t stream) {
  const auto kernel = skinny_mma_kernel<T, kLargeByStep, kSmallByStep, kRank>;
  constexpr int kSharedBytes = SkinnyTile<kLargeByStep, kSmallByStep, kRank>::kSharedBytes;
  allow_shared_memory(reinterpret_cast<const void*>(kernel), name, kSharedBytes);
  const int64_t tiles = ceil_div(output.outer, kOuter) * ceil_div(output.rank, kRank);
  const unsigned cluster = skinny_clusters() ? skinny_cluster(tiles, kLargeByStep ? large.rows : large.columns) : 1;
  const dim3 grid(grid_size(tiles * cluster, name), split);
  const Launch launch{grid, kThreads, kSharedBytes, stream, cluster, true};
  launch_kernel(name, problem, launch, kernel, large, small, dropout, output);
}

template <typename T, bool kLargeByStep, bool kSmallByStep>
void skinny_mma(const char* name, const std::string& problem, const Dense<T>& large, const Dense<T>& small,
                const Dropout& dropout, const Output& output, int split, cudaStream_t stream) {
  const auto launch = output.rank <= 16 ? launch_skinny_mma<T, kLargeByStep, kSmallByStep, 16>
                                        : launch_skinny_mma<T, kLargeByStep, kSmallByStep, 64>;
  launch(name, problem, large, small, dropout, output, split, stream);
}

// --- float32 ---

constexpr int kSimtTile = 64;
constexpr int kSimtStep = 16;
constexpr int kSimtPitch = kSimtTile + 4;

// An operand by its strides along the output and along the reduction; one of the two is 1.
struct Strided {
  const float* data;
  int64_t outer, outer_stride, step_stride;
};

__device__ inline void load_strided(float (&tile)[kSimtStep][kSimtPitch], const Strided& operand, int64_t outer0,
                                    int64_t step0, int64_t end, const Dropout& dropout, uint64_t seed) {
#pragma unroll
  for (int i = 0; i < kSimtTile * kSimtStep / kThreads; ++i) {
    const int index = threadIdx.x + i * kThreads;
    const bool by_step = operand.step_stride == 1;
    const int step = by_step ? index % kSimtStep : index / kSimtTile;
    const int outer = by_step ? index / kSimtStep : index % kSimtTile;
    float value = 0.0f;
    if (outer0 + outer < operand.outer && step0 + step < end) {
      const int64_t from = (outer0 + outer) * operand.outer_stride + (step0 + step) * operand.step_stride;
      value = operand.data[from];
      if (dropout.active() && !keeps(seed, dropout.threshold, from)) value = 0.0f;
    }
    tile[step][outer] = value;
  }
}

__global__ void __launch_bounds__(kThreads, 2)
    skinny_simt_kernel(const __grid_constant__ Strided large, const __grid_constant__ Strided small, int64_t reduction,
                       const __grid_constant__ Dropout dropout, const __grid_constant__ Output output) {
  __shared__ alignas(16) float large_tile[kSimtStep][kSimtPitch];
  __shared__ alignas(16) float small_tile[kSimtStep][kSimtPitch];
  const int part = blockIdx.y, parts = gridDim.y;
  const int64_t all_steps = (reduction + kSimtStep - 1) / kSimtStep;
  const int64_t first = all_steps * part / parts, last = all_steps * (part + 1) / parts;
  const int rank_tiles = static_cast<int>((output.rank + kSimtTile - 1) / kSimtTile);
  const int64_t outer0 = int64_t{blockIdx.x / rank_tiles} * kSimtTile, rank0 = blockIdx.x % rank_tiles * kSimtTile;
  const uint64_t seed = dropout.active() ? static_cast<uint64_t>(*dropout.seed) : 0;
  const Dropout no_dropout{nullptr, 0, 1.0f};
  const int row = threadIdx.x / 16 * 4, column = threadIdx.x % 16 * 4;

  float sum[4][4] = {};
  for (int64_t step = first; step < last; ++step) {
    __syncthreads();  // the previous step's reads are done
    load_strided(large_tile, large, outer0, step * kSimtStep, reduction, dropout, seed);
    load_strided(small_tile, small, rank0, step * kSimtStep, reduction, no_dropout, 0);
    __syncthreads();
#pragma unroll
    for (int s = 0; s < kSimtStep; ++s) {
      const float4 a = *reinterpret_cast<const float4*>(&large_tile[s][row]);
      const float4 b = *reinterpret_cast<const float4*>(&small_tile[s][column]);
      const float left[4] = {a.x, a.y, a.z, a.w}, right[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] = fmaf(left[i], right[j], sum[i][j]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) store<float>(output, part, outer0 + row + i, rank0 + column + j, sum[i][j]);
  }
}

void skinny_simt(const char* name, const std::string& problem, const Strided& large, const Strided& small,
                 int64_t reduction, const Dropout& dropout, const Output& output, int split, cudaStream_t stream) {
  const unsigned tiles = grid_size(ceil_div(output.outer, kSimtTile) * ceil_div(output.rank, kSimtTile), name);
  skinny_simt_kernel<<<dim3(tiles, split), kThreads, 0, stream>>>(large, small, reduction, dropout, output);
  check_launch(name, problem);
}

// --- A few rows of x: split along k over the blocks of a cluster ---

// A cluster computes 16 rows × 8 ranks of the output, each block over an eighth of k at most: one wave of blocks that
// each have all their loads under way at once, because for so small a product the time is latency. Where there are no
// clusters, one block goes over all of k.
constexpr int64_t kFewRows = 16;
constexpr int kFewRanks = 8;
constexpr int kFewThreads = 512;
constexpr int kFewWarps = kFewThreads / 32;
constexpr int kFewOutputs = kFewRows * kFewRanks;
constexpr int kFewStep = 512;  // of k, of a block

// 16 bytes of a row from column k on, zeros where the row ends. Not through the read-only path: a kernel that starts
// early runs while its operands are written. Aligned rows are loaded without a branch, so that loads can be gathered.
template <bool kVector, typename T>
__device__ uint4 load_16(const T* row, int64_t k, int64_t columns) {
  if constexpr (kVector) {
    return reinterpret_cast<const uint4*>(row + (k < columns ? k : 0))[0];
  } else {
    using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
    uint32_t word[4] = {};
#pragma unroll
    for (int i = 0; i < 16 / static_cast<int>(sizeof(T)); ++i) {
      if (k + i >= columns) break;
      word[i * sizeof(T) / 4] |= uint32_t{reinterpret_cast<const Bits*>(row + k)[i]} << (i * sizeof(T) % 4 * 8);
    }
    return make_uint4(word[0], word[1], word[2], word[3]);
  }
}

__device__ inline void zero_unless(bool inside, uint4& words) {
  words = make_uint4(inside ? words.x : 0, inside ? words.y : 0, inside ? words.z : 0, inside ? words.w : 0);
}

// A row past the last becomes the last: what it contributes to is not stored.
template <typename T>
__device__ const T* row_of(const Dense<T>& matrix, int64_t row) {
  return matrix.data + min(row, matrix.rows - 1) * matrix.columns;
}

// The same for several times 16 bytes, which aligned rows hold multiples of.
template <bool kVector, typename T, int kWords>
__device__ void load_words(const T* row, int64_t k, int64_t columns, uint4 (&words)[kWords]) {
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    if constexpr (kVector) {
      words[w] = reinterpret_cast<const uint4*>(row + (k < columns ? k : 0))[w];
    } else {
      words[w] = load_16<kVector>(row, k + w * (16 / static_cast<int>(sizeof(T))), columns);
    }
  }
}

// Eight elements of the 16-bit type T, of which a float32 factor's are rounded.
template <typename T>
__device__ uint4 eight_of(const uint4 (&words)[1]) {
  return words[0];
}
template <typename T>
__device__ uint4 eight_of(const uint4 (&words)[2]) {
  const auto pair = [](uint32_t first, uint32_t second) {
    return pack_pair<T>(__uint_as_float(first), __uint_as_float(second));
  };
  return make_uint4(pair(words[0].x, words[0].y), pair(words[0].z, words[0].w), pair(words[1].x, words[1].y),
                    pair(words[1].z, words[1].w));
}

// The sums of a warp's share of k, [row][rank], to shared memory. Tensor cores: each warp takes 32 of a step, a lane 8
// consecutive elements of a row, which are k in another order than the operands' but the same one in both. A: T or
// float.
template <typename T, typename A, bool kVector>
struct FewRows {
  static constexpr int kGroups = kFewWarps;  // warps with different k
  static __device__ void multiply(const Dense<T>& x, const Dense<A>& a, int64_t rank0, int64_t first, int64_t stride,
                                  float (*sums)[kFewOutputs]) {
    constexpr int kInFlight = kVector ? 4 : 1;
    constexpr int kFactorWords = sizeof(A) / sizeof(T);  // of 16 bytes, to eight elements
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, column = lane % 4 * 8;
    const T* x_low = row_of(x, row);
    const T* x_high = row_of(x, row + 8);
    const A* a_row = row_of(a, rank0 + row);
    const bool both = x.rows > 8;
    ptx::FragC sum = {};
#pragma unroll 1
    for (int64_t k0 = first + 32 * warp; k0 < x.columns; k0 += kInFlight * stride) {
      uint4 low[kInFlight], high[kInFlight], factor[kInFlight][kFactorWords];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int64_t k = k0 + i * stride + column;
        low[i] = load_16<kVector>(x_low, k, x.columns);
        load_words<kVector>(a_row, k, x.columns, factor[i]);
        high[i] = both ? load_16<kVector>(x_high, k, x.columns) : low[i];
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const bool inside = k0 + i * stride + column < x.columns;
        uint4 of_a = eight_of<T>(factor[i]);
        zero_unless(inside, low[i]), zero_unless(inside, high[i]), zero_unless(inside, of_a);
        ptx::mma<T>(sum, {{low[i].x, high[i].x, low[i].y, high[i].y}}, {{of_a.x, of_a.y}});
        ptx::mma<T>(sum, {{low[i].z, high[i].z, low[i].w, high[i].w}}, {{of_a.z, of_a.w}});
      }
    }
    float* output = sums[warp] + row * kFewRanks + lane % 4 * 2;
    *reinterpret_cast<float2*>(output) = make_float2(sum.value[0], sum.value[1]);
    *reinterpret_cast<float2*>(output + 8 * kFewRanks) = make_float2(sum.value[2], sum.value[3]);
  }
};

// float32: a warp takes 4 of the rows and 128 of a step, a lane 4 consecutive elements.
template <bool kVector>
struct FewRows<float, float, kVector> {
  static constexpr int kGroups = 4;
  static __device__ void multiply(const Dense<float>& x, const Dense<float>& a, int64_t rank0, int64_t first,
                                  int64_t stride, float (*sums)[kFewOutputs]) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = warp / 4, row0 = warp % 4 * 4;
    float sum[4 * kFewRanks] = {};
    if (row0 < x.rows) {
#pragma unroll 1
      for (int64_t k = first + 128 * group + 4 * lane; k < x.columns; k += stride) {
        uint4 left[4], right[kFewRanks];
#pragma unroll
        for (int i = 0; i < 4; ++i) left[i] = load_16<kVector>(row_of(x, row0 + i), k, x.columns);
#pragma unroll
        for (int j = 0; j < kFewRanks; ++j) right[j] = load_16<kVector>(row_of(a, rank0 + j), k, x.columns);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int j = 0; j < kFewRanks; ++j) {
            float& s = sum[i * kFewRanks + j];
            s = fmaf(__uint_as_float(left[i].x), __uint_as_float(right[j].x), s);
            s = fmaf(__uint_as_float(left[i].y), __uint_as_float(right[j].y), s);
            s = fmaf(__uint_as_float(left[i].z), __uint_as_float(right[j].z), s);
            s = fmaf(__uint_as_float(left[i].w), __uint_as_float(right[j].w), s);
          }
        }
      }
    }
    // 32 sums over 32 lanes: each step halves the sums that a lane keeps, until lane i has the total of sum i.
#pragma unroll
    for (int half = 16; half > 0; half >>= 1) {
      const bool upper = (lane & half) != 0;
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        if (i >= half) continue;
        const float kept = upper ? sum[i + half] : sum[i], sent = upper ? sum[i] : sum[i + half];
        sum[i] = kept + __shfl_xor_sync(0xFFFFFFFFu, sent, half);
      }
    }
    sums[group][row0 * kFewRanks + lane] = sum[0];
  }
};

template <typename T, typename A, bool kVector>
__global__ void __launch_bounds__(kFewThreads, 1)
    lora_down_few_rows_kernel(const __grid_constant__ Dense<T> x, const __grid_constant__ Dense<A> a, float scaling,
                              T* xa) {
  using Product = FewRows<T, A, kVector>;
  __shared__ alignas(16) float sums[Product::kGroups][kFewOutputs];
  __shared__ float parts[kLargestCluster][kFewOutputs];  // the first block's: what each block sent
  __shared__ alignas(8) uint64_t parts_barrier;
  const uint32_t part = ptx::cluster_rank(), part_count = ptx::cluster_size();
  if (threadIdx.x == 0) ptx::expect_from_cluster(&parts_barrier, part_count * kFewOutputs * 4);
  ptx::arrive_cluster();
  ptx::wait_for_previous_kernel();
  ptx::let_next_kernel_start();

  const int64_t rank0 = int64_t{blockIdx.x / part_count} * kFewRanks;
  Product::multiply(x, a, rank0, int64_t{part} * kFewStep, int64_t{part_count} * kFewStep, sums);
  ptx::wait_cluster();  // the first block's barrier is ready
  __syncthreads();
  const int index = threadIdx.x;
  if (index >= kFewOutputs) return;
  float sum = 0.0f;
#pragma unroll
  for (int group = 0; group < Product::kGroups; ++group) sum += sums[group][index];
  if (part_count > 1) {
    ptx::send_to_rank(&parts[part][index], &parts_barrier, 0, sum);
    if (part > 0) return;
    ptx::wait_for_cluster(&parts_barrier);
    sum = 0.0f;
    for (uint32_t i = 0; i < part_count; ++i) sum += parts[i][index];
  }
  const int64_t row = index / kFewRanks, rank = rank0 + index % kFewRanks;
  if (row < x.rows && rank < a.rows) xa[row * a.rows + rank] = from_float<T>(sum * scaling);
}

template <typename T, typename A>
void lora_down_few_rows(const std::string& problem, const Dense<T>& x, const Dense<A>& a, float scaling, T* xa,
                        cudaStream_t stream) {
  const auto kernel =
      x.vector && a.vector ? lora_down_few_rows_kernel<T, A, true> : lora_down_few_rows_kernel<T, A, false>;
  const int64_t tiles = ceil_div(a.rows, kFewRanks);
  unsigned cluster = 1;
  if (has_sm_90_code(reinterpret_cast<const void*>(kernel))) {
    const auto pays = [&](unsigned blocks) {
      return blocks <= kLargestCluster && (blocks - 1) * kFewStep < x.columns &&
             tiles * blocks <= current_device().sm_count;  // a second wave costs more than a longer share of k
    };
    while (pays(2 * cluster)) cluster *= 2;
  }
  const unsigned grid = grid_size(tiles * cluster, "lora_down");
  launch_kernel("lora_down", problem, {grid, kFewThreads, 0, stream, cluster, true}, kernel, x, a, scaling, xa);
}

// --- float32 factors for kernels that take them in the activations' dtype ---

constexpr int kRoundedTogether = 4;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    round_factor_kernel(const float* from, int64_t count, bool vector, T* to, uint32_t* begun) {
  if (begun != nullptr) {
    // As in lora_wgmma.cu, whose kernel comes next and lets the linear start at once.
    if (blockIdx.x == 0 && threadIdx.x == 0) ptx::store_word(begun, 0), __threadfence();
    __syncthreads();
    ptx::let_next_kernel_start();
    ptx::wait_for_previous_kernel();
    if (blockIdx.x == 0 && threadIdx.x == 0) ptx::store_word(begun, 1);
  } else {
    ptx::wait_for_previous_kernel();
    ptx::let_next_kernel_start();
  }
  const int64_t first = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kRoundedTogether;
  if (first >= count) return;
  if (vector) {
    const float4 v = *reinterpret_cast<const float4*>(from + first);
    *reinterpret_cast<uint2*>(to + first) = make_uint2(pack_pair<T>(v.x, v.y), pack_pair<T>(v.z, v.w));
    return;
  }
  for (int64_t i = first; i < min(first + kRoundedTogether, count); ++i) to[i] = from_float<T>(from[i]);
}

// --- Gradients: the reduction over m in parts ---

// Parts that a kernel of its own adds up, where clusters do not: enough blocks to fill the GPU a few times over, but no
// part shorter than 512 rows.
int grad_split(DType dtype, int64_t m, int64_t columns, int64_t rank) {
  if (dtype != DType::kFloat32 && skinny_clusters()) return 1;
  const int64_t tiles = ceil_div(columns, kOuter) * ceil_div(rank, rank <= 16 ? 16 : 64);
  const int64_t wanted = ceil_div(int64_t{4} * current_device().sm_count, tiles);
  return static_cast<int>(std::clamp<int64_t>(std::min(wanted, m / 512), 1, 32));
}

__global__ void __launch_bounds__(kThreads) add_parts_kernel(const float* __restrict__ partial, int split, int64_t size,
                                                             float alpha, float* __restrict__ output) {
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < size; i += int64_t{gridDim.x} * kThreads) {
    float sum = 0.0f;
    for (int part = 0; part < split; ++part) sum += partial[part * size + i];
    output[i] = sum * alpha;
  }
}

// grad(i, j) = sum over rows of large[row, i] · small[row, j].
void lora_grad(const char* name, DType dtype, int64_t m, int64_t columns, int64_t rank, const void* large,
               const void* small, const Dropout& dropout, int64_t outer_stride, int64_t rank_stride,
               bool beside_previous, float* grad, void* workspace, cudaStream_t stream) {
  if (columns <= 0 || rank <= 0) return;
  const int split = grad_split(dtype, m, columns, rank);
  const float alpha = dropout.active() ? dropout.scale : 1.0f;
  float* partial = split > 1 ? static_cast<float*>(workspace) : nullptr;
  const Output output{{grad, true, columns, rank, outer_stride, rank_stride, alpha}, partial};
  const std::string problem =
      "of " + std::to_string(m) + " rows, " + std::to_string(columns) + " columns and rank " + std::to_string(rank);
  const SkinnyProblem skinny{large, small, m, output, beside_previous};
  if (!dropout.active() && lora_wgmma(name, problem, dtype, true, true, skinny, stream)) return;
  if (dtype == DType::kFloat32) {
    skinny_simt(name, problem, {static_cast<const float*>(large), columns, 1, columns},
                {static_cast<const float*>(small), rank, 1, rank}, m, dropout, output, split, stream);
  } else {
    with_half_type(dtype, [&](auto element) {
      using T = decltype(element);
      skinny_mma<T, true, true>(name, problem, make_dense<T>(large, m, columns), make_dense<T>(small, m, rank), dropout,
                                output, split, stream);
    });
  }
  if (split > 1) {
    const int64_t size = columns * rank;
    const int64_t blocks = std::min<int64_t>(ceil_div(size, kThreads), 65536);
    add_parts_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(partial, split, size, alpha, grad);
    check_launch("lora_grad's sum of parts", problem);
  }
}

}  // namespace

uint32_t* take_word(LinearDirection direction, const QuantizedMatrix& weight, DType dtype, int64_t m, int64_t rank,
                    cudaStream_t stream) {
  return plan_lora_linear(direction, weight, dtype, m, rank).beside > 0 ? next_word(stream) : nullptr;
}

void round_factor(DType dtype, const float* from, int64_t count, void* to, uint32_t* begun, cudaStream_t stream) {
  if (count <= 0) return;
  const bool vector = aligned_16(from) && aligned_16(to) && count % kRoundedTogether == 0;
  const unsigned grid = grid_size(ceil_div(count, int64_t{kThreads} * kRoundedTogether), "round_factor");
  with_half_type(dtype, [&](auto element) {
    using T = decltype(element);
    launch_kernel("round_factor", "of " + std::to_string(count) + " elements", {grid, kThreads, 0, stream, 1, true},
                  round_factor_kernel<T>, from, count, vector, static_cast<T*>(to), begun);
  });
}

bool lora_down_reads_float(DType dtype, int64_t m, const Dropout& dropout) {
  return dtype != DType::kFloat32 && m <= kFewRows && !dropout.active();
}

const uint32_t* lora_down(const QuantizedMatrix& weight, DType dtype, int64_t m, int64_t rank, const void* x,
                          const void* a, bool float_a, float scaling, const Dropout& dropout, void* xa,
                          const uint32_t* begun, cudaStream_t stream) {
  const int64_t k = weight.k;
  if (m <= 0 || rank <= 0) return begun;
  const std::string problem =
      "of " + std::to_string(m) + " rows, " + std::to_string(k) + " columns and rank " + std::to_string(rank);
  if (m <= kFewRows && !dropout.active()) {
    with_element_type(dtype, [&](auto element) {
      using T = decltype(element);
      const auto launch = [&](const auto& factor) {
        lora_down_few_rows(problem, make_dense<T>(x, m, k), factor, scaling, static_cast<T*>(xa), stream);
      };
      float_a ? launch(make_dense<float>(a, rank, k)) : launch(make_dense<T>(a, rank, k));
    });
    return begun;
  }
  const float alpha = dropout.active() ? scaling * dropout.scale : scaling;
  const Output output{{xa, false, m, rank, rank, 1, alpha}, nullptr};
  if (!dropout.active()) {
    const LinearPlan plan = plan_lora_linear(LinearDirection::kForward, weight, dtype, m, rank);
    const SkinnyProblem skinny{x, a, k, output, false, plan.beside, plan.cluster(), begun};
    if (const auto word = lora_wgmma("lora_down", problem, dtype, false, false, skinny, stream)) return *word;
  }
  if (dtype == DType::kFloat32) {
    skinny_simt("lora_down", problem, {static_cast<const float*>(x), m, k, 1},
                {static_cast<const float*>(a), rank, k, 1}, k, dropout, output, 1, stream);
    return begun;
  }
  with_half_type(dtype, [&](auto element) {
    using T = decltype(element);
    skinny_mma<T, false, false>("lora_down", problem, make_dense<T>(x, m, k), make_dense<T>(a, rank, k), dropout,
                                output, 1, stream);
  });
  return begun;
}

const uint32_t* lora_dya(const QuantizedMatrix& weight, DType dtype, int64_t m, int64_t rank, const void* dy,
                         const void* b, float scaling, bool beside, void* dya, const uint32_t* begun,
                         cudaStream_t stream) {
  const int64_t n = weight.n;
  if (m <= 0 || rank <= 0) return begun;
  const std::string problem =
      "of " + std::to_string(m) + " rows, " + std::to_string(n) + " columns and rank " + std::to_string(rank);
  const Dropout no_dropout{nullptr, 0, 1.0f};
  const Output output{{dya, false, m, rank, rank, 1, scaling}, nullptr};
  SkinnyProblem skinny{dy, b, n, output};
  if (beside) {
    const LinearPlan plan = plan_lora_linear(LinearDirection::kDx, weight, dtype, m, rank);
    skinny.beside_rows = plan.beside, skinny.beside_cluster = plan.cluster(), skinny.begun = begun;
  }
  if (const auto word = lora_wgmma("lora_dya", problem, dtype, false, true, skinny, stream)) return *word;
  if (dtype == DType::kFloat32) {
    skinny_simt("lora_dya", problem, {static_cast<const float*>(dy), m, n, 1},
                {static_cast<const float*>(b), rank, 1, rank}, n, no_dropout, output, 1, stream);
    return begun;
  }
  with_half_type(dtype, [&](auto element) {
    using T = decltype(element);
    skinny_mma<T, false, true>("lora_dya", problem, make_dense<T>(dy, m, n), make_dense<T>(b, n, rank), no_dropout,
                               output, 1, stream);
  });
  return begun;
}

int64_t lora_grad_workspace(DType dtype, int64_t m, int64_t columns, int64_t rank) {
  if (m <= 0 || columns <= 0 || rank <= 0) return 0;
  const int split = grad_split(dtype, m, columns, rank);
  return split > 1 ? int64_t{split} * columns * rank * 4 : 0;
}

void lora_grad_a(DType dtype, int64_t m, int64_t k, int64_t rank, const void* dya, const void* x,
                 const Dropout& dropout, float* da, void* workspace, cudaStream_t stream) {
  lora_grad("lora_grad_a", dtype, m, k, rank, x, dya, dropout, 1, k, false, da, workspace, stream);
}

void lora_grad_b(DType dtype, int64_t m, int64_t n, int64_t rank, const void* dy, const void* xa, float* db,
                 void* workspace, cudaStream_t stream) {
  const Dropout no_dropout{nullptr, 0, 1.0f};
  lora_grad("lora_grad_b", dtype, m, n, rank, dy, xa, no_dropout, rank, 1, true, db, workspace, stream);
}

}  // namespace pyquant::cuda
