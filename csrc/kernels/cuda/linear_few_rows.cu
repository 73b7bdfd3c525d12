// The forward for up to 16 rows of x on tensor cores, where only the weight's bytes matter: each is read once, straight
// from the stored layout into registers, and never repacked.
//
// W is the left operand of mma.m16n8k16, x the right one. A packed byte holds two neighbouring k of one row of W, which
// is just what one register of the left operand holds: a table turns a byte into that register with one load from
// shared memory. The table has a copy for every bank, so the 32 lanes read 32 different bytes without a conflict. The
// reduction may visit k in any order as long as both operands agree, so a lane takes 8 consecutive bytes of a row and
// the 16 consecutive values of x that belong to them.
//
// The 16 k of one instruction lie in one block of the weight: absmax multiplies the fp32 sum of 64 products, not each
// weight, and the table needs the bare codebook.
#include "kernels/cuda/launch.h"
#include "kernels/cuda/linear_kernels.h"
#include "ptx/mma.h"

namespace pyquant::cuda {
namespace {

constexpr int kWarps = 8;  // that share out the reduction of a block's tile
constexpr int kThreads = 32 * kWarps;
constexpr int kChunk = 64;  // k that share one absmax and one step of a warp
constexpr int kGroup = 4;   // chunks whose absmax the four lanes of a row decode together

constexpr int kTableBytes = 256 * 32 * sizeof(uint32_t);

// The register for every byte, 32 copies of each: entry [byte][bank].
template <typename T>
__device__ void fill_pair_table(uint32_t* table, const Weight& weight) {
  // A thread stores four copies at once, eight threads the copies of one byte.
  for (int i = threadIdx.x; i < 256 * 8; i += kThreads) {
    const int byte = i / 8;
    const uint32_t pair = pack_pair<T>(weight.codebook[byte >> 4], weight.codebook[byte & 15]);
    reinterpret_cast<uint4*>(table)[i] = make_uint4(pair, pair, pair, pair);
  }
}

// The table's entry for byte kByte of a word; lane_offset is 4 · lane, in bits that a byte's own offset leaves free.
template <int kByte>
__device__ inline uint32_t look_up(const uint32_t* table, uint32_t word, uint32_t lane_offset) {
  const uint32_t shifted = kByte == 0 ? word << 7 : word >> (8 * kByte - 7);
  return *reinterpret_cast<const uint32_t*>(reinterpret_cast<const char*>(table) + ((shifted & 0x7F80u) | lane_offset));
}

// One warp's step: 64 products of every output of its tiles, each row's sum scaled by its absmax. `packed`: a lane's 8
// bytes of rows g and g + 8 of each tile; `values`: its 16 values of each token; `scale`: of the four chunks of a
// group, one a lane of the row, of which chunk `c` is meant.
template <typename T, int kTokenTiles, int kTiles>
__device__ inline void multiply_chunk(const uint32_t* table, uint32_t lane_offset, const uint2 (&packed)[kTiles][2],
                                      const uint4 (&values)[kTokenTiles][2], const float (&scale)[kTiles][2], int c,
                                      ptx::FragC (&sum)[kTiles][kTokenTiles]) {
  uint32_t pair[kTokenTiles][8];
#pragma unroll
  for (int i = 0; i < kTokenTiles; ++i) {
    const uint4 low = values[i][0], high = values[i][1];
    pair[i][0] = low.x, pair[i][1] = low.y, pair[i][2] = low.z, pair[i][3] = low.w;
    pair[i][4] = high.x, pair[i][5] = high.y, pair[i][6] = high.z, pair[i][7] = high.w;
  }
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    ptx::FragC product[kTokenTiles] = {};
    const uint2 upper = packed[i][0], lower = packed[i][1];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t from_upper = j < 2 ? upper.x : upper.y, from_lower = j < 2 ? lower.x : lower.y;
      ptx::FragA a;
      if (j % 2 == 0) {
        a.reg[0] = look_up<0>(table, from_upper, lane_offset);
        a.reg[1] = look_up<0>(table, from_lower, lane_offset);
        a.reg[2] = look_up<1>(table, from_upper, lane_offset);
        a.reg[3] = look_up<1>(table, from_lower, lane_offset);
      } else {
        a.reg[0] = look_up<2>(table, from_upper, lane_offset);
        a.reg[1] = look_up<2>(table, from_lower, lane_offset);
        a.reg[2] = look_up<3>(table, from_upper, lane_offset);
        a.reg[3] = look_up<3>(table, from_lower, lane_offset);
      }
#pragma unroll
      for (int u = 0; u < kTokenTiles; ++u) {
        ptx::mma<T>(product[u], a, {{pair[u][2 * j], pair[u][2 * j + 1]}});
      }
    }
    const float upper_scale = __shfl_sync(0xFFFFFFFFu, scale[i][0], c, 4);
    const float lower_scale = __shfl_sync(0xFFFFFFFFu, scale[i][1], c, 4);
#pragma unroll
    for (int u = 0; u < kTokenTiles; ++u) {
      float (&total)[4] = sum[i][u].value;
      const float (&part)[4] = product[u].value;
      total[0] = fmaf(upper_scale, part[0], total[0]);
      total[1] = fmaf(upper_scale, part[1], total[1]);
      total[2] = fmaf(lower_scale, part[2], total[2]);
      total[3] = fmaf(lower_scale, part[3], total[3]);
    }
  }
}

// Adds the warps' sums in order, with bias and the low-rank term, and writes the tile. `partial` takes the table's
// place.
template <typename T, int kTokens, int kTiles>
__device__ inline void finish_tile(float* partial, const ptx::FragC (&sum)[kTiles][kTokens / 8], int warp, int lane,
                                   int64_t row0, int64_t n, int m, const T* bias, const LowRank& lora, T* y) {
  constexpr int kTokenTiles = kTokens / 8;
  constexpr int kRows = 16 * kTiles;
  static_assert(kWarps * kRows * kTokens * sizeof(float) <= kTableBytes, "the partial sums take the table's place");
  const int g = lane / 4, t = lane % 4;
  __syncthreads();  // the last look-ups are done
  {                 // [warp][token][row]
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int u = 0; u < kTokenTiles; ++u) {
#pragma unroll
        for (int v = 0; v < 4; ++v) {
          const int row = 16 * i + 8 * (v / 2) + g, column = 8 * u + 2 * t + v % 2;
          partial[(warp * kTokens + column) * kRows + row] = sum[i][u].value[v];
        }
      }
    }
  }
  __syncthreads();
  for (int index = threadIdx.x; index < kTokens * kRows; index += kThreads) {
    const int token = index / kRows;
    const int64_t row = row0 + index % kRows;
    if (token >= m || row >= n) continue;
    float total = bias != nullptr ? to_float(bias[row]) : 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += partial[w * kTokens * kRows + index];
    const T* left = static_cast<const T*>(lora.left) + token * lora.rank;
    const T* factor = static_cast<const T*>(lora.factor) + row * lora.rank;
    for (int64_t r = 0; r < lora.rank; ++r) total = fmaf(to_float(left[r]), to_float(factor[r]), total);
    y[token * n + row] = from_float<T>(total);
  }
}

// kTokens: rows of x, padded to 8 or 16. kTiles: tiles of 16 rows of W that a block works on, so that x is read once
// for all of them. kDepth: chunks whose bytes are on their way. The block's warps share out the reduction.
template <typename T, int kTokens, int kTiles, int kDepth>
__global__ void __launch_bounds__(kThreads, 2)
    linear_few_rows_kernel(const __grid_constant__ Weight weight, int m, const T* __restrict__ x,
                           const T* __restrict__ bias, const __grid_constant__ LowRank lora, T* __restrict__ y) {
  constexpr int kTokenTiles = kTokens / 8;
  constexpr int kRows = 16 * kTiles;
  extern __shared__ uint4 shared[];
  uint32_t* table = reinterpret_cast<uint32_t*>(shared);
  __shared__ DecodeTables tables;

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int g = lane / 4, t = lane % 4;
  const int64_t n = weight.matrix.n, k = weight.matrix.k;
  const int64_t row0 = int64_t{blockIdx.x} * kRows;
  const int chunks = static_cast<int>(k / kChunk);
  const int groups = (chunks + kGroup - 1) / kGroup;

  // Offsets within the tile of W fit 32 bits. Rows beyond n and chunks beyond k are loaded from the last ones: their
  // products are dropped or multiplied by 0.
  const uint8_t* packed_tile = weight.matrix.packed + row0 * k / 2;
  const int64_t first_element = row0 * k;
  const int last_row = static_cast<int>(min(int64_t{kRows}, n - row0)) - 1;
  uint32_t element[kTiles][2];  // where a lane's rows begin
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      element[i][half] = static_cast<uint32_t>(min(16 * i + 8 * half + g, last_row)) * static_cast<uint32_t>(k);
    }
  }
  uint32_t token[kTokenTiles];
#pragma unroll
  for (int i = 0; i < kTokenTiles; ++i) token[i] = static_cast<uint32_t>(min(8 * i + g, m - 1)) * k + 16 * t;

  uint2 packed[kDepth][kTiles][2];
  const auto load_packed = [&](int slot, int chunk) {
    const uint32_t at = static_cast<uint32_t>(min(chunk, chunks - 1)) * (kChunk / 2) + 8 * t;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        packed[slot][i][half] = __ldcs(reinterpret_cast<const uint2*>(packed_tile + (element[i][half] / 2 + at)));
      }
    }
  };
  AbsmaxLoad absmax[kTiles][2];
  const auto load_group_absmax = [&](int group) {
    const uint32_t at = static_cast<uint32_t>(min(group * kGroup + t, chunks - 1)) * kChunk;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        absmax[i][half] = load_absmax(weight, (first_element + (element[i][half] + at)) >> weight.blocksize_log2);
      }
    }
  };
  uint4 values[2][kTokenTiles][2];
  const auto load_values = [&](int slot, int chunk) {
    const uint32_t at = static_cast<uint32_t>(min(chunk, chunks - 1)) * kChunk;
#pragma unroll
    for (int i = 0; i < kTokenTiles; ++i) {
      const uint4* from = reinterpret_cast<const uint4*>(x + (token[i] + at));
      values[slot][i][0] = __ldg(from);
      values[slot][i][1] = __ldg(from + 1);
    }
  };

  if (warp < groups) {
#pragma unroll
    for (int slot = 0; slot < kDepth; ++slot) load_packed(slot, warp * kGroup + slot);
    load_group_absmax(warp);
    load_values(0, warp * kGroup);
  }
  // While those travel.
  fill_pair_table<T>(table, weight);
  load_tables(tables, weight);
  const float offset = load_offset(weight);
  __syncthreads();

  const uint32_t lane_offset = 4 * lane;
  ptx::FragC sum[kTiles][kTokenTiles] = {};
  for (int group = warp; group < groups; group += kWarps) {
    float scale[kTiles][2];
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float decoded = finish_absmax(tables, weight, absmax[i][half], offset);
        scale[i][half] = group * kGroup + t < chunks ? decoded : 0.0f;
      }
    }
    const int next = group + kWarps;
    if (next < groups) load_group_absmax(next);

#pragma unroll
    for (int c = 0; c < kGroup; ++c) {
      const int chunk = group * kGroup + c;
      const int after = c + 1 < kGroup ? chunk + 1 : next * kGroup;
      load_values((c + 1) % 2, after);
      multiply_chunk<T>(table, lane_offset, packed[c % kDepth], values[c % 2], scale, c, sum);
      const int ahead = c + kDepth < kGroup ? chunk + kDepth : next * kGroup + c + kDepth - kGroup;
      load_packed(c % kDepth, ahead);
    }
  }

  finish_tile<T, kTokens>(reinterpret_cast<float*>(shared), sum, warp, lane, row0, n, m, bias, lora, y);
}

}  // namespace

void linear_few_rows(const LinearArguments& arguments, const LinearPlan& plan, cudaStream_t stream) {
  const QuantizedMatrix& matrix = arguments.weight.matrix;
  const unsigned grid = grid_size(ceil_div(matrix.n, plan.tile_n), "linear_few_rows");
  with_half_type(arguments.dtype, [&](auto element) {
    using T = decltype(element);
    const auto launch = [&](auto* kernel) {
      kernel<<<grid, kThreads, kTableBytes, stream>>>(
          arguments.weight, static_cast<int>(arguments.m), static_cast<const T*>(arguments.input),
          static_cast<const T*>(arguments.bias), arguments.lora, static_cast<T*>(arguments.output));
    };
    if (arguments.m <= 8) {
      if (plan.tile_n == 16) return launch(linear_few_rows_kernel<T, 8, 1, 4>);
      return launch(linear_few_rows_kernel<T, 8, 2, 2>);
    }
    if (plan.tile_n == 16) return launch(linear_few_rows_kernel<T, 16, 1, 2>);
    return launch(linear_few_rows_kernel<T, 16, 2, 2>);
  });
  check_launch("linear_few_rows", "of " + std::to_string(arguments.m) + " rows and a [" + std::to_string(matrix.n) +
                                      ", " + std::to_string(matrix.k) + "] weight");
}

}  // namespace pyquant::cuda
