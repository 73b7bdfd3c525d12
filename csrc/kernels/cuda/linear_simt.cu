// The 4-bit linear in fp32 arithmetic without tensor cores: float32 activations (whose precision tf32 would lose), and
// every type and shape besides.
#include "kernels/cuda/dropout.h"
#include "kernels/cuda/element.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/linear_kernels.h"

namespace pyquant::cuda {
namespace {

// A block computes a 64 × 64 tile of the output in steps of 16 along the reduction; a thread 4 × 4 of it.
constexpr int kThreads = 256;
constexpr int kTile = 64;
constexpr int kStep = 16;
constexpr int kPitch = kTile + 4;  // floats; a multiple of 4 for vector reads, spread over the banks for the writes

struct Tiles {
  float left[kStep][kPitch];   // [reduction][row of the output]
  float right[kStep][kPitch];  // [reduction][column of the output]
};

// left: rows [row0, row0 + 64) and columns [step0, step0 + 16) of a row-major matrix [rows, reduction].
template <typename T>
__device__ void load_left(Tiles& tiles, const T* __restrict__ matrix, int64_t row0, int64_t rows, int64_t step0,
                          int64_t reduction) {
#pragma unroll
  for (int i = 0; i < kTile * kStep / kThreads; ++i) {
    const int index = threadIdx.x + i * kThreads;
    const int step = index % kStep, row = index / kStep;
    const bool inside = row0 + row < rows && step0 + step < reduction;
    tiles.left[step][row] = inside ? to_float(matrix[(row0 + row) * reduction + step0 + step]) : 0.0f;
  }
}

// right: for kTransposed a matrix [columns, reduction], read along its rows, else [reduction, columns]. `element` gives
// the value at a flattened index.
template <bool kTransposed, typename F>
__device__ void load_right(Tiles& tiles, int64_t column0, int64_t columns, int64_t step0, int64_t reduction,
                           const F& element) {
#pragma unroll
  for (int i = 0; i < kTile * kStep / kThreads; ++i) {
    const int index = threadIdx.x + i * kThreads;
    const int step = kTransposed ? index % kStep : index / kTile;
    const int column = kTransposed ? index / kStep : index % kTile;
    const bool inside = column0 + column < columns && step0 + step < reduction;
    const int64_t flat =
        kTransposed ? (column0 + column) * reduction + step0 + step : (step0 + step) * columns + column0 + column;
    tiles.right[step][column] = inside ? element(flat) : 0.0f;
  }
}

// A running sum that keeps what its additions round off (two-sum, Knuth, The Art of Computer Programming 4.2.2). Plain
// fp32 sums over thousands of products lose several times what the vendors' float32 products do, whose partial sums are
// many and short.
struct Sum {
  float value = 0.0f, rest = 0.0f;

  __device__ void add(float term) {
    const float total = value + term;
    const float virtual_term = total - value;
    rest += (value - (total - virtual_term)) + (term - virtual_term);
    value = total;
  }
};

// Products are added up plainly in groups of four, which costs less precision than the final rounding.
constexpr int kGroup = 4;

__device__ inline void multiply(const Tiles& tiles, int row, int column, Sum (&sum)[4][4]) {
#pragma unroll
  for (int group = 0; group < kStep; group += kGroup) {
    float part[4][4] = {};
#pragma unroll
    for (int step = group; step < group + kGroup; ++step) {
      const float4 a = *reinterpret_cast<const float4*>(&tiles.left[step][row]);
      const float4 b = *reinterpret_cast<const float4*>(&tiles.right[step][column]);
      const float left[4] = {a.x, a.y, a.z, a.w}, right[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) part[i][j] = fmaf(left[i], right[j], part[i][j]);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[i][j].add(part[i][j]);
    }
  }
}

template <typename T, LinearDirection kDirection>
__global__ void __launch_bounds__(kThreads, 2)
    linear_simt_kernel(const __grid_constant__ Weight weight, int64_t m, const T* __restrict__ input,
                       const T* __restrict__ bias, const __grid_constant__ LowRank lora,
                       const __grid_constant__ Dropout dropout, T* __restrict__ output) {
  constexpr bool kForward = kDirection == LinearDirection::kForward;
  __shared__ Tiles tiles;
  __shared__ DecodeTables tables;
  load_tables(tables, weight);
  const float offset = load_offset(weight);
  const int64_t columns = kForward ? weight.matrix.n : weight.matrix.k;
  const int64_t reduction = kForward ? weight.matrix.k : weight.matrix.n;
  const int64_t tiles_m = (m + kTile - 1) / kTile;
  const int64_t row0 = blockIdx.x % tiles_m * kTile, column0 = blockIdx.x / tiles_m * kTile;
  const int row = threadIdx.x / 16 * 4, column = threadIdx.x % 16 * 4;

  Sum sum[4][4];
  if (lora.rank > 0) {
    const T* left = static_cast<const T*>(lora.left);
    const T* factor = static_cast<const T*>(lora.factor);
    for (int64_t step0 = 0; step0 < lora.rank; step0 += kStep) {
      __syncthreads();
      load_left(tiles, left, row0, m, step0, lora.rank);
      load_right<kForward>(tiles, column0, columns, step0, lora.rank,
                           [&](int64_t index) { return to_float(factor[index]); });
      __syncthreads();
      multiply(tiles, row, column, sum);
    }
    if (dropout.active()) {
      const uint64_t seed = static_cast<uint64_t>(*dropout.seed);
      const int64_t first = (row0 + row) * columns + column0 + column;
      uint32_t kept = 0;
#pragma unroll 1
      for (int i = 0; i < 16; ++i) {
        kept |= (keeps(seed, dropout.threshold, first + i / 4 * columns + i % 4) ? 1u : 0u) << i;
      }
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        Sum& element = sum[i / 4][i % 4];
        const bool keep = (kept >> i & 1u) != 0;
        element.value = keep ? (element.value + element.rest) * dropout.scale : 0.0f;
        element.rest = 0.0f;
      }
    }
  }
  for (int64_t step0 = 0; step0 < reduction; step0 += kStep) {
    __syncthreads();  // the previous step's reads are done, and before the first step the tables are there
    load_left(tiles, input, row0, m, step0, reduction);
    load_right<kForward>(tiles, column0, columns, step0, reduction, [&](int64_t index) {
      return to_float(from_float<T>(decode_element(tables, weight, index, offset)));
    });
    __syncthreads();
    multiply(tiles, row, column, sum);
  }

#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t to_row = row0 + row + i, to_column = column0 + column + j;
      if (to_row >= m || to_column >= columns) continue;
      if (bias != nullptr) sum[i][j].add(to_float(bias[to_column]));
      output[to_row * columns + to_column] = from_float<T>(sum[i][j].value + sum[i][j].rest);
    }
  }
}

}  // namespace

void linear_simt(const LinearArguments& arguments, LinearDirection direction, cudaStream_t stream) {
  const QuantizedMatrix& matrix = arguments.weight.matrix;
  const int64_t columns = direction == LinearDirection::kForward ? matrix.n : matrix.k;
  const unsigned grid = grid_size(ceil_div(arguments.m, kTile) * ceil_div(columns, kTile), "linear_simt");
  with_element_type(arguments.dtype, [&](auto element) {
    using T = decltype(element);
    auto* kernel = direction == LinearDirection::kForward ? linear_simt_kernel<T, LinearDirection::kForward>
                                                          : linear_simt_kernel<T, LinearDirection::kDx>;
    kernel<<<grid, kThreads, 0, stream>>>(arguments.weight, arguments.m, static_cast<const T*>(arguments.input),
                                          static_cast<const T*>(arguments.bias), arguments.lora, arguments.dropout,
                                          static_cast<T*>(arguments.output));
  });
  check_launch("linear_simt", "of [" + std::to_string(arguments.m) + "] rows and a [" + std::to_string(matrix.n) +
                                  ", " + std::to_string(matrix.k) + "] weight");
}

}  // namespace pyquant::cuda
