// The 4-bit linear on tensor cores through mma.sync, for any m, n and k.
//
// A block computes one tile of the output. Along the reduction it takes steps of 64: the activations come through
// cp.async, the packed weight through registers, decoded into shared memory exactly as dequantization would round it.
// Two buffers: while one step multiplies, the next one's bytes travel. The low-rank term is a few steps more, in front,
// with dense operands; so dropout of that term is applied to the accumulators when only it is in them.
#include "kernels/cuda/launch.h"
#include "kernels/cuda/linear_kernels.h"
#include "kernels/cuda/tile.h"

namespace pyquant::cuda {
namespace {

constexpr int kStep = 64;
// Tiles of W are decoded in chunks of 32 consecutive elements: 16 bytes, and never across blocks when k % 32 == 0.
constexpr int kChunk = 32;

template <int kTileM_, int kTileN_, int kWarpsM_, int kWarpsN_, int kMinBlocks_>
struct Config {
  static constexpr int kTileM = kTileM_, kTileN = kTileN_, kWarpsM = kWarpsM_, kWarpsN = kWarpsN_;
  static constexpr int kMinBlocks = kMinBlocks_;  // on an SM
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN;
  static constexpr int kWarpM = kTileM / kWarpsM, kWarpN = kTileN / kWarpsN;
  static constexpr int kFragsM = kWarpM / 16, kFragsN = kWarpN / 8;
  static_assert(kTileN * kStep == kThreads * kChunk, "every thread decodes one chunk of W a step");
};
using LargeTile = Config<128, 128, 2, 4, 2>;
using SmallTile = Config<64, 64, 2, 2, 4>;

// The tile of W (and of the low-rank factor) in shared memory keeps W's own orientation: [n][k] in both directions.
template <typename C, LinearDirection kDirection>
struct WeightTile {
  static constexpr bool kForward = kDirection == LinearDirection::kForward;
  static constexpr int kRows = kForward ? C::kTileN : kStep;
  static constexpr int kColumns = kForward ? kStep : C::kTileN;
  static constexpr int kPitch = padded(kColumns);
  static constexpr int kElements = kRows * kPitch;

  // The chunk of a thread. Pairs of threads read 32 neighbouring bytes, a whole memory sector; the rows of neighbouring
  // pairs differ, which keeps the 16-byte stores of the decoded chunk free of bank conflicts.
  PYQUANT_HOST_DEVICE static constexpr int chunk_row(int thread) { return thread / 2 % kRows; }
  PYQUANT_HOST_DEVICE static constexpr int chunk_column(int thread) {
    return (thread % 2 + thread / 2 / kRows * 2) * kChunk;
  }
};

template <typename C, LinearDirection kDirection, typename T>
struct Shared {
  static constexpr int kInputElements = C::kTileM * padded(kStep);
  alignas(16) T input[2][kInputElements];
  alignas(16) T weight[2][WeightTile<C, kDirection>::kElements];
  DecodeTables tables;
};

// The bytes of one chunk on their way.
struct PackedChunk {
  uint4 packed;
  AbsmaxLoad absmax;
  bool inside;
};

template <typename T>
__device__ void store_pairs(T* tile, const float (&value)[8]) {
  *reinterpret_cast<uint4*>(tile) = make_uint4(pack_pair<T>(value[0], value[1]), pack_pair<T>(value[2], value[3]),
                                               pack_pair<T>(value[4], value[5]), pack_pair<T>(value[6], value[7]));
}

template <typename T, LinearDirection kDirection>
struct Parameters {
  Weight weight;
  bool vector_weight;
  Dense<T> input, left, factor;
  const T* bias;
  Dropout dropout;
  T* output;
  bool vector_output;
  float* partial;  // [split][m][partial_pitch] when the reduction is split, else null
  int64_t partial_pitch;
  int64_t m, columns, reduction;
  int lora_steps;
  int64_t steps;  // of W
  int split;
};

template <typename T, typename C, LinearDirection kDirection>
__global__ void __launch_bounds__(C::kThreads, C::kMinBlocks)
    linear_mma_kernel(const __grid_constant__ Parameters<T, kDirection> p) {
  using W = WeightTile<C, kDirection>;
  constexpr bool kForward = kDirection == LinearDirection::kForward;
  extern __shared__ __align__(16) unsigned char dynamic_shared[];
  auto& shared = *reinterpret_cast<Shared<C, kDirection, T>*>(dynamic_shared);
  load_tables(shared.tables, p.weight);
  const float offset = load_offset(p.weight);

  // Blocks that run together share rows and columns of tiles: 16 tiles along m at a time.
  const int tiles_m = static_cast<int>((p.m + C::kTileM - 1) / C::kTileM);
  const int tiles_n = static_cast<int>((p.columns + C::kTileN - 1) / C::kTileN);
  const int part = blockIdx.y;
  int tile_m, tile_n;
  {
    constexpr int kGroup = 16;
    const int64_t group_tiles = int64_t{kGroup} * tiles_n;
    const int group = static_cast<int>(blockIdx.x / group_tiles);
    const int in_group = static_cast<int>(blockIdx.x % group_tiles);
    const int group_rows = min(kGroup, tiles_m - group * kGroup);
    tile_m = group * kGroup + in_group % group_rows;
    tile_n = in_group / group_rows;
  }
  const int64_t row0 = int64_t{tile_m} * C::kTileM, column0 = int64_t{tile_n} * C::kTileN;

  // This block's share of the steps along the reduction.
  const int64_t first_step = p.steps * part / p.split;
  const int64_t steps = p.steps * (part + 1) / p.split - first_step;

  const int chunk_row = W::chunk_row(threadIdx.x), chunk_column = W::chunk_column(threadIdx.x);
  const int64_t n = p.weight.matrix.n, k = p.weight.matrix.k;

  // Position of W's tile at a step.
  const auto weight_row0 = [&](int64_t step) { return kForward ? column0 : (first_step + step) * kStep; };
  const auto weight_column0 = [&](int64_t step) { return kForward ? (first_step + step) * kStep : column0; };
  PackedChunk chunk{};

  const auto start_loads = [&](int64_t step) {
    load_tile<C::kTileM, kStep, C::kThreads>(shared.input[step & 1], p.input, row0, (first_step + step) * kStep);
    if (p.vector_weight) {
      const int64_t row = weight_row0(step) + chunk_row, column = weight_column0(step) + chunk_column;
      chunk.inside = row < n && column < k;
      const int64_t index = chunk.inside ? row * k + column : 0;
      chunk.packed = __ldg(reinterpret_cast<const uint4*>(p.weight.matrix.packed + index / 2));
      chunk.absmax = load_absmax(p.weight, index >> p.weight.blocksize_log2);
    }
    ptx::commit_copies();
  };

  const auto decode = [&](int64_t step) {
    T* tile = shared.weight[step & 1] + chunk_row * W::kPitch + chunk_column;
    if (p.vector_weight) {
      // Outside the matrix the absmax is 0, and so is every element.
      const float absmax = chunk.inside ? finish_absmax(shared.tables, p.weight, chunk.absmax, offset) : 0.0f;
      const uint32_t word[4] = {chunk.packed.x, chunk.packed.y, chunk.packed.z, chunk.packed.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float value[8];
        decode_word(shared.tables, word[i], value);
#pragma unroll
        for (int j = 0; j < 8; ++j) value[j] = chunk.inside ? __fmul_rn(value[j], absmax) : 0.0f;
        store_pairs(tile + 8 * i, value);
      }
    } else {
      const int64_t row = weight_row0(step) + chunk_row, column = weight_column0(step) + chunk_column;
#pragma unroll 1
      for (int i = 0; i < kChunk; ++i) {
        const bool inside = row < n && column + i < k;
        tile[i] = from_float<T>(inside ? decode_element(shared.tables, p.weight, row * k + column + i, offset) : 0.0f);
      }
    }
  };

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_row = warp % C::kWarpsM * C::kWarpM, warp_column = warp / C::kWarpsM * C::kWarpN;
  ptx::FragC sum[C::kFragsM][C::kFragsN] = {};

  // Where value v of accumulator (i, j) belongs, inside the tile.
  const auto value_row = [&](int i, int v) { return warp_row + 16 * i + lane / 4 + (v >= 2 ? 8 : 0); };
  const auto value_column = [&](int j, int v) { return warp_column + 8 * j + lane % 4 * 2 + (v & 1); };

  const auto apply_dropout = [&] {
    const uint64_t seed = static_cast<uint64_t>(*p.dropout.seed);
    // The masks first, in a rolled loop: bit 4 · (i · kFragsN + j) + v.
    static_assert(C::kFragsM * C::kFragsN * 4 <= 64);
    uint64_t kept = 0;
#pragma unroll 1
    for (int bit = 0; bit < C::kFragsM * C::kFragsN * 4; ++bit) {
      const int i = bit / 4 / C::kFragsN, j = bit / 4 % C::kFragsN, v = bit % 4;
      const int64_t index = (row0 + value_row(i, v)) * p.columns + column0 + value_column(j, v);
      kept |= (keeps(seed, p.dropout.threshold, index) ? uint64_t{1} : 0) << bit;
    }
#pragma unroll
    for (int i = 0; i < C::kFragsM; ++i) {
#pragma unroll
      for (int j = 0; j < C::kFragsN; ++j) {
#pragma unroll
        for (int v = 0; v < 4; ++v) {
          float& value = sum[i][j].value[v];
          value = (kept >> (4 * (i * C::kFragsN + j) + v) & 1) != 0 ? value * p.dropout.scale : 0.0f;
        }
      }
    }
  };

  const auto multiply = [&](int buffer) {
    const T* input = shared.input[buffer];
    const T* weight = shared.weight[buffer];
#pragma unroll
    for (int inner = 0; inner < kStep; inner += 16) {
      ptx::FragA a[C::kFragsM];
      ptx::FragB b[C::kFragsN];
#pragma unroll
      for (int i = 0; i < C::kFragsM; ++i) a[i] = load_a<false>(input, padded(kStep), warp_row + 16 * i, inner);
#pragma unroll
      for (int j = 0; j < C::kFragsN; j += 2) {
        load_b<!kForward>(weight, W::kPitch, warp_column + 8 * j, inner, b[j], b[j + 1]);
      }
#pragma unroll
      for (int i = 0; i < C::kFragsM; ++i) {
#pragma unroll
        for (int j = 0; j < C::kFragsN; ++j) ptx::mma<T>(sum[i][j], a[i], b[j]);
      }
    }
  };

  __syncthreads();  // the tables
  start_loads(0);
  decode(0);

  // The low-rank steps, in the first part only and in buffer 1, while step 0 of W arrives in buffer 0.
  if (part == 0 && p.lora_steps > 0) {
    for (int step = 0; step < p.lora_steps; ++step) {
      load_tile<C::kTileM, kStep, C::kThreads>(shared.input[1], p.left, row0, step * kStep);
      load_tile<W::kRows, W::kColumns, C::kThreads>(shared.weight[1], p.factor, kForward ? column0 : step * kStep,
                                                    kForward ? step * kStep : column0);
      ptx::commit_copies();
      ptx::wait_copies<0>();
      __syncthreads();
      multiply(1);
      __syncthreads();  // before buffer 1 is written again
    }
    if (!kForward && p.dropout.active()) apply_dropout();
  }

  for (int64_t step = 0; step < steps; ++step) {
    ptx::wait_copies<0>();
    // This step's tiles are complete, and every warp is done with the buffers of the step before.
    __syncthreads();
    if (step + 1 < steps) start_loads(step + 1);
    multiply(step & 1);
    if (step + 1 < steps) decode(step + 1);
  }

  if (p.partial != nullptr) {
    float* partial = p.partial + int64_t{part} * p.m * p.partial_pitch;
#pragma unroll
    for (int i = 0; i < C::kFragsM; ++i) {
#pragma unroll
      for (int j = 0; j < C::kFragsN; ++j) {
#pragma unroll
        for (int v = 0; v < 4; v += 2) {
          const int64_t row = row0 + value_row(i, v), column = column0 + value_column(j, v);
          if (row >= p.m || column >= p.columns) continue;
          *reinterpret_cast<float2*>(partial + row * p.partial_pitch + column) =
              make_float2(sum[i][j].value[v], sum[i][j].value[v + 1]);
        }
      }
    }
    return;
  }

  // Through shared memory, so that rows of the output are written in 16-byte pieces.
  constexpr int kPitch = padded(C::kTileN);
  static_assert(C::kTileM * kPitch * sizeof(T) <= sizeof(shared.input) + sizeof(shared.weight));
  T* tile = reinterpret_cast<T*>(dynamic_shared);
  __syncthreads();  // the last step's reads are done
#pragma unroll
  for (int j = 0; j < C::kFragsN; ++j) {
    const int column = value_column(j, 0);
    const float bias0 = p.bias != nullptr && column0 + column < p.columns ? to_float(p.bias[column0 + column]) : 0.0f;
    const float bias1 =
        p.bias != nullptr && column0 + column + 1 < p.columns ? to_float(p.bias[column0 + column + 1]) : 0.0f;
#pragma unroll
    for (int i = 0; i < C::kFragsM; ++i) {
#pragma unroll
      for (int v = 0; v < 4; v += 2) {
        *reinterpret_cast<uint32_t*>(tile + value_row(i, v) * kPitch + column) =
            pack_pair<T>(sum[i][j].value[v] + bias0, sum[i][j].value[v + 1] + bias1);
      }
    }
  }
  __syncthreads();
  if (p.vector_output) {
    constexpr int kPieces = C::kTileN / 8;
#pragma unroll 4
    for (int piece = threadIdx.x; piece < C::kTileM * kPieces; piece += C::kThreads) {
      const int row = piece / kPieces, column = piece % kPieces * 8;
      if (row0 + row >= p.m || column0 + column >= p.columns) continue;
      *reinterpret_cast<uint4*>(p.output + (row0 + row) * p.columns + column0 + column) =
          *reinterpret_cast<const uint4*>(tile + row * kPitch + column);
    }
  } else {
#pragma unroll 1
    for (int index = threadIdx.x; index < C::kTileM * C::kTileN; index += C::kThreads) {
      const int row = index / C::kTileN, column = index % C::kTileN;
      if (row0 + row >= p.m || column0 + column >= p.columns) continue;
      p.output[(row0 + row) * p.columns + column0 + column] = tile[row * kPitch + column];
    }
  }
}

// The sum of the parts, in their order, so that every run gives the same bits.
template <typename T>
__global__ void __launch_bounds__(256)
    add_parts_kernel(const float* __restrict__ partial, int split, int64_t m, int64_t columns, int64_t pitch,
                     const T* __restrict__ bias, T* __restrict__ output) {
  const int64_t pairs = pitch / 2;
  for (int64_t index = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; index < m * pairs;
       index += int64_t{gridDim.x} * blockDim.x) {
    const int64_t row = index / pairs, column = index % pairs * 2;
    float2 sum = make_float2(0.0f, 0.0f);
    for (int part = 0; part < split; ++part) {
      const float2 value = *reinterpret_cast<const float2*>(partial + (int64_t{part} * m + row) * pitch + column);
      sum.x += value.x, sum.y += value.y;
    }
    T* to = output + row * columns + column;
    to[0] = from_float<T>(sum.x + (bias != nullptr ? to_float(bias[column]) : 0.0f));
    if (column + 1 < columns) to[1] = from_float<T>(sum.y + (bias != nullptr ? to_float(bias[column + 1]) : 0.0f));
  }
}

template <typename T, typename C, LinearDirection kDirection>
void launch(const LinearArguments& arguments, const LinearPlan& plan, cudaStream_t stream) {
  constexpr bool kForward = kDirection == LinearDirection::kForward;
  const QuantizedMatrix& matrix = arguments.weight.matrix;
  Parameters<T, kDirection> p{};
  p.weight = arguments.weight;
  p.vector_weight = matrix.k % kChunk == 0 && aligned_16(matrix.packed);
  p.m = arguments.m;
  p.columns = kForward ? matrix.n : matrix.k;
  p.reduction = kForward ? matrix.k : matrix.n;
  p.input = make_dense<T>(arguments.input, arguments.m, p.reduction);
  const int64_t rank = arguments.lora.rank;
  if (rank > 0) {
    p.left = make_dense<T>(arguments.lora.left, arguments.m, rank);
    p.factor = make_dense<T>(arguments.lora.factor, kForward ? matrix.n : rank, kForward ? rank : matrix.k);
  }
  p.bias = static_cast<const T*>(arguments.bias);
  p.dropout = arguments.dropout;
  p.output = static_cast<T*>(arguments.output);
  p.vector_output = aligned_16(p.output) && p.columns % 8 == 0;
  p.lora_steps = static_cast<int>(ceil_div(rank, kStep));
  p.steps = ceil_div(p.reduction, kStep);
  p.split = plan.split;
  if (p.split > 1) {
    p.partial = static_cast<float*>(arguments.workspace);
    p.partial_pitch = (p.columns + 1) / 2 * 2;
  }

  const auto kernel = linear_mma_kernel<T, C, kDirection>;
  constexpr int kSharedBytes = sizeof(Shared<C, kDirection, T>);
  allow_shared_memory(reinterpret_cast<const void*>(kernel), "linear_mma", kSharedBytes);
  const unsigned tiles = grid_size(ceil_div(p.m, C::kTileM) * ceil_div(p.columns, C::kTileN), "linear_mma");
  kernel<<<dim3(tiles, p.split), C::kThreads, kSharedBytes, stream>>>(p);
  const std::string problem = "of " + std::to_string(p.m) + " rows and a [" + std::to_string(matrix.n) + ", " +
                              std::to_string(matrix.k) + "] weight";
  check_launch("linear_mma", problem);
  if (p.split > 1) {
    const int64_t blocks = ceil_div(p.m * p.partial_pitch / 2, 256);
    add_parts_kernel<T><<<static_cast<unsigned>(blocks < 65536 ? blocks : 65536), 256, 0, stream>>>(
        p.partial, p.split, p.m, p.columns, p.partial_pitch, p.bias, p.output);
    check_launch("linear_mma's sum of parts", problem);
  }
}

}  // namespace

void linear_mma(const LinearArguments& arguments, LinearDirection direction, const LinearPlan& plan,
                cudaStream_t stream) {
  with_half_type(arguments.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr LinearDirection kForward = LinearDirection::kForward, kDx = LinearDirection::kDx;
    if (direction == kForward) {
      plan.tile_m == 128 ? launch<T, LargeTile, kForward>(arguments, plan, stream)
                         : launch<T, SmallTile, kForward>(arguments, plan, stream);
    } else {
      plan.tile_m == 128 ? launch<T, LargeTile, kDx>(arguments, plan, stream)
                         : launch<T, SmallTile, kDx>(arguments, plan, stream);
    }
  });
}

}  // namespace pyquant::cuda
