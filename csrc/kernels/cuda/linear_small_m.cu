// The forward for up to 8 rows of x, where only the weight's bytes matter: each is read once, by a warp that has whole
// rows of W to itself (or shares them with up to 3 others along k, where there are few rows).
//
// A lane takes 16 packed bytes, 32 weights of one row in one block, decodes them to fp32 and multiplies them with every
// row of x; the block's absmax comes in once for the 32. x lies in shared memory.
#include "kernels/cuda/launch.h"
#include "kernels/cuda/linear_kernels.h"

namespace pyquant::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kChunk = 32;
constexpr int kChunkPitch = kChunk + 8;  // an odd number of 16-byte units: lanes read their chunks without conflicts

// kM: rows of x. kRows: rows of W that a warp works on together, each value of x read once for all of them.
template <typename T, int kM, int kRows>
__global__ void __launch_bounds__(kThreads, 2)
    linear_small_m_kernel(const __grid_constant__ Weight weight, int m, const T* __restrict__ x,
                          const T* __restrict__ bias, const __grid_constant__ LowRank lora, T* __restrict__ y,
                          int split) {
  constexpr int kSlabChunks = kM <= 4 ? 128 : 64;  // of x, in shared memory at a time
  __shared__ alignas(16) T slab[kM][kSlabChunks][kChunkPitch];
  __shared__ DecodeTables tables;
  __shared__ float partial[kWarps][kRows * kM];
  load_tables(tables, weight);
  const float offset = load_offset(weight);

  const int64_t n = weight.matrix.n, k = weight.matrix.k;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int groups = kWarps / split, group = warp / split, part = warp % split;
  const int64_t row0 = (int64_t{blockIdx.x} * groups + group) * kRows;
  const int64_t chunks = k / kChunk;
  const int stride = 32 * split;  // chunks that the warps of a group take at a time
  const int64_t iterations = (chunks + stride - 1) / stride;
  const int slab_iterations = kSlabChunks / stride;

  uint4 packed[kRows];
  AbsmaxLoad absmax[kRows];
  const auto load = [&](int64_t iteration) {
    // Beyond the end a lane loads the last chunk, and beyond n the last row, whose products nobody uses.
    const int64_t chunk = min(iteration * stride + part * 32 + lane, chunks - 1);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t index = min(row0 + r, n - 1) * k + chunk * kChunk;
      packed[r] = __ldg(reinterpret_cast<const uint4*>(weight.matrix.packed + index / 2));
      absmax[r] = load_absmax(weight, index >> weight.blocksize_log2);
    }
  };

  float sum[kRows][kM] = {};
  load(0);
  for (int64_t iteration = 0; iteration < iterations; ++iteration) {
    if (iteration % slab_iterations == 0) {
      __syncthreads();  // the previous slab's reads are done
      const int64_t slab_k = iteration * stride * kChunk;
      for (int piece = threadIdx.x; piece < kM * kSlabChunks * 4; piece += kThreads) {
        const int row = piece / (kSlabChunks * 4), in_row = piece % (kSlabChunks * 4);
        const int64_t column = slab_k + in_row * 8;
        uint4 value = make_uint4(0, 0, 0, 0);
        if (row < m && column < k) value = __ldg(reinterpret_cast<const uint4*>(x + row * k + column));
        *reinterpret_cast<uint4*>(&slab[row][in_row / 4][in_row % 4 * 8]) = value;
      }
      __syncthreads();  // with the slab, the tables on the first iteration
    }

    uint32_t word[kRows][4];
    float scale[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      word[r][0] = packed[r].x, word[r][1] = packed[r].y, word[r][2] = packed[r].z, word[r][3] = packed[r].w;
      scale[r] = finish_absmax(tables, weight, absmax[r], offset);
    }
    if (iteration + 1 < iterations) load(iteration + 1);
    if (iteration * stride + part * 32 + lane >= chunks) continue;  // no barrier further down the loop

    const int in_slab = static_cast<int>(iteration % slab_iterations) * stride + part * 32 + lane;
    float product[kRows][kM] = {};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float value[kRows][8];
#pragma unroll
      for (int r = 0; r < kRows; ++r) decode_word(tables, word[r][j], value[r]);
#pragma unroll
      for (int row = 0; row < kM; ++row) {
        const uint4 pairs = *reinterpret_cast<const uint4*>(&slab[row][in_slab][8 * j]);
        const uint32_t pair[4] = {pairs.x, pairs.y, pairs.z, pairs.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 both = unpack_pair<T>(pair[i]);
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            product[r][row] = fmaf(value[r][2 * i], both.x, product[r][row]);
            product[r][row] = fmaf(value[r][2 * i + 1], both.y, product[r][row]);
          }
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int row = 0; row < kM; ++row) sum[r][row] = fmaf(scale[r], product[r][row], sum[r][row]);
    }
  }

  if (part == 0 && lora.rank > 0) {
    const T* left = static_cast<const T*>(lora.left);
    const T* factor = static_cast<const T*>(lora.factor);
    for (int64_t i = lane; i < lora.rank; i += 32) {
#pragma unroll
      for (int row = 0; row < kM; ++row) {
        const float from_left = row < m ? to_float(left[row * lora.rank + i]) : 0.0f;
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const float from_factor = to_float(factor[min(row0 + r, n - 1) * lora.rank + i]);
          sum[r][row] = fmaf(from_left, from_factor, sum[r][row]);
        }
      }
    }
  }

#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int row = 0; row < kM; ++row) {
#pragma unroll
      for (int distance = 16; distance > 0; distance >>= 1) {
        sum[r][row] += __shfl_xor_sync(0xFFFFFFFFu, sum[r][row], distance);
      }
      if (lane == 0) partial[warp][r * kM + row] = sum[r][row];
    }
  }
  __syncthreads();
  for (int index = threadIdx.x; index < groups * kRows * kM; index += kThreads) {
    const int from_group = index / (kRows * kM), value = index % (kRows * kM);
    const int row = value % kM;
    const int64_t column = (int64_t{blockIdx.x} * groups + from_group) * kRows + value / kM;
    if (row >= m || column >= n) continue;
    float total = bias != nullptr ? to_float(bias[column]) : 0.0f;
    for (int i = 0; i < split; ++i) total += partial[from_group * split + i][value];
    y[row * n + column] = from_float<T>(total);
  }
}

}  // namespace

void linear_small_m(const LinearArguments& arguments, const LinearPlan& plan, cudaStream_t stream) {
  const QuantizedMatrix& matrix = arguments.weight.matrix;
  const unsigned grid = grid_size(ceil_div(matrix.n, plan.tile_n), "linear_small_m");
  with_half_type(arguments.dtype, [&](auto element) {
    using T = decltype(element);
    const auto launch = [&](auto* kernel) {
      kernel<<<grid, kThreads, 0, stream>>>(
          arguments.weight, static_cast<int>(arguments.m), static_cast<const T*>(arguments.input),
          static_cast<const T*>(arguments.bias), arguments.lora, static_cast<T*>(arguments.output), plan.split);
    };
    // Rows of W a warp, as small_m_plan has it.
    if (arguments.m == 1) {
      launch(linear_small_m_kernel<T, 1, 4>);
    } else if (arguments.m == 2) {
      launch(linear_small_m_kernel<T, 2, 4>);
    } else if (arguments.m <= 4) {
      launch(linear_small_m_kernel<T, 4, 2>);
    } else {
      launch(linear_small_m_kernel<T, 8, 2>);
    }
  });
  check_launch("linear_small_m", "of " + std::to_string(arguments.m) + " rows and a [" + std::to_string(matrix.n) +
                                     ", " + std::to_string(matrix.k) + "] weight");
}

}  // namespace pyquant::cuda
