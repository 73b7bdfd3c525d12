// Quantization to 4 bits, and double quantization's 8-bit pass. Both give bitsandbytes' CPU bytes.
#include <cmath>
#include <cstring>
#include <type_traits>

#include "format/codebook.h"
#include "kernels/cuda/element.h"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/launch.h"
#include "ptx/cluster.h"

namespace pyquant::cuda {
namespace {

// A block of threads takes a tile of consecutive elements, a whole number of quantization blocks of any size, in two
// rows. A thread takes a piece of 32 bytes from each row, and all loads are under way before the first is used.
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kPieces = 2;
template <typename T>
constexpr int kElements = 32 / sizeof(T);
template <typename T>
constexpr int kRow = kThreads * kElements<T>;
static_assert(kPieces * kRow<float> == 4096, "the largest blocksize");

// --- Finding the code of a normalised value ---
//
// The code is kOrder[number of thresholds below the value]. [-1, 1] is cut into 32 cells so narrow that each holds at
// most one threshold: one fused multiply-add gives the value's cell, and one comparison decides. That is exact whatever
// the rounding at the cells' borders, as a threshold's own cell is found the same way and the way is monotonic.

struct Cell {
  float threshold;  // the one in the cell, or infinity
  uint32_t below;   // thresholds in lower cells
};

constexpr int kCells = 32;
// Of a float between 2^20 and 2^21 the last three bits are eighths. Those of value · kCellScale + kCellOffset, with the
// three cleared, are the offset in bytes of the value's cell.
constexpr float kCellScale = 15.5f;
constexpr float kCellOffset = 1048576.0f + 16.0f;
constexpr uint32_t kCellMask = (kCells - 1) * sizeof(Cell);
static_assert(sizeof(Cell) == 8);

// FP4's thresholds around zero are closer together: the cells hold the middle one, and the two beside it are compared
// with every value.
constexpr bool beside_zero(bool is_fp4, int i) { return is_fp4 && (i == 6 || i == 8); }

constexpr bool cells_hold_one(const Thresholds& thresholds, bool is_fp4) {
  float last = -2.0f;
  for (int i = 0; i < 15; ++i) {
    if (beside_zero(is_fp4, i)) continue;
    if ((thresholds.value[i] - last) * kCellScale <= 1.0f) return false;
    last = thresholds.value[i];
  }
  return true;
}
static_assert(cells_hold_one(kNF4Thresholds, false) && cells_hold_one(kFP4Thresholds, true));

struct Quantizer {
  Cell cell[kCells];
  float threshold[15];
  uint32_t order[16];
};

Quantizer make_quantizer(QuantType type) {
  const bool is_fp4 = type == QuantType::kFP4;
  const Thresholds& thresholds = is_fp4 ? kFP4Thresholds : kNF4Thresholds;
  Quantizer quantizer{};
  for (int i = 0; i < 15; ++i) quantizer.threshold[i] = thresholds.value[i];
  for (int i = 0; i < 16; ++i) quantizer.order[i] = is_fp4 ? kFP4Order[i] : kNF4Order[i];
  for (Cell& cell : quantizer.cell) cell.threshold = INFINITY;
  for (int i = 0; i < 15; ++i) {
    if (beside_zero(is_fp4, i)) continue;
    const float position = std::fma(thresholds.value[i], kCellScale, kCellOffset);
    uint32_t bits;
    std::memcpy(&bits, &position, sizeof bits);
    const uint32_t own = (bits & kCellMask) / sizeof(Cell);
    quantizer.cell[own].threshold = thresholds.value[i];
    for (uint32_t cell = own + 1; cell < kCells; ++cell) ++quantizer.cell[cell].below;
  }
  return quantizer;
}

struct Tables {
  Cell cell[kCells];
  float threshold[15];
  uint32_t order[16];
  uint8_t order_of_pair[256];  // a byte of two numbers of thresholds to a byte of their codes
};

template <bool kIsFP4>
__device__ void load_tables(Tables& tables, const Quantizer& quantizer) {
  const int i = threadIdx.x;
  if (i < kCells) tables.cell[i] = quantizer.cell[i];
  if (i < 15) tables.threshold[i] = quantizer.threshold[i];
  if (i < 16) tables.order[i] = quantizer.order[i];
  if (kIsFP4) tables.order_of_pair[i] = quantizer.order[i / 16] << 4 | quantizer.order[i % 16];
}
static_assert(kThreads == 256, "a thread to each pair");

// Of eight values in [-1, 1], give or take a rounding: the four packed bytes.
template <bool kIsFP4>
__device__ uint32_t encode(const Tables& tables, const float* normalised) {
  uint32_t word = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float value = normalised[i];
    const uint32_t offset = __float_as_uint(__fmaf_rn(value, kCellScale, kCellOffset)) & kCellMask;
    const uint2 cell = *reinterpret_cast<const uint2*>(reinterpret_cast<const char*>(tables.cell) + offset);
    const int shift = 8 * (i / 2) + (i % 2 == 0 ? 4 : 0);
    word += cell.y << shift;
    if (value > __uint_as_float(cell.x)) word += 1u << shift;
    if (kIsFP4) {
      constexpr float kBelowZero = kFP4Thresholds.value[6], kAboveZero = kFP4Thresholds.value[8];
      if (value > kBelowZero) word += 1u << shift;
      if (value > kAboveZero) word += 1u << shift;
    }
  }
  if (kIsFP4) {
    word = uint32_t{tables.order_of_pair[word & 0xFFu]} | uint32_t{tables.order_of_pair[word >> 8 & 0xFFu]} << 8 |
           uint32_t{tables.order_of_pair[word >> 16 & 0xFFu]} << 16 | uint32_t{tables.order_of_pair[word >> 24]} << 24;
  }
  return word;
}

// The code of any value: infinities count as ±1, and a NaN as -1.
__device__ inline uint32_t encode_any(const Tables& tables, float normalised) {
  const float value = fminf(fmaxf(normalised, -1.0f), 1.0f);
  int below = value > tables.threshold[7] ? 8 : 0;
  below += value > tables.threshold[below + 3] ? 4 : 0;
  below += value > tables.threshold[below + 1] ? 2 : 0;
  below += value > tables.threshold[below] ? 1 : 0;
  return tables.order[below];
}

// --- A thread's piece in registers ---

constexpr uint32_t kInfinity = 0x7F800000u;  // its bits; those of a NaN's magnitude are greater

struct Piece {
  uint32_t word[8];
};

template <typename T>
__device__ Piece load_piece(const T* input) {
  const uint4 low = reinterpret_cast<const uint4*>(input)[0], high = reinterpret_cast<const uint4*>(input)[1];
  return {{low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w}};
}

// The first `left` elements alone, then zeros; aligned as their type is.
template <typename T>
__device__ Piece load_part(const T* input, int64_t left) {
  Piece piece{};
#pragma unroll
  for (int i = 0; i < kElements<T>; ++i) {
    if (i >= left) break;
    if constexpr (sizeof(T) == 4) {
      piece.word[i] = __float_as_uint(input[i]);
    } else {
      piece.word[i / 2] |= uint32_t{reinterpret_cast<const uint16_t*>(input)[i]} << (16 * (i % 2));
    }
  }
  return piece;
}

template <typename T>
__device__ void to_floats(const Piece& piece, float (&value)[kElements<T>]) {
#pragma unroll
  for (int i = 0; i < kElements<T>; i += 2) {
    if constexpr (sizeof(T) == 4) {
      value[i] = __uint_as_float(piece.word[i]), value[i + 1] = __uint_as_float(piece.word[i + 1]);
    } else {
      const float2 pair = unpack_pair<T>(piece.word[i / 2]);
      value[i] = pair.x, value[i + 1] = pair.y;
    }
  }
}

// The bits of the largest magnitude as a float32. Magnitudes compare like their bits, and a NaN's bits are above
// infinity's: the maximum keeps it. The shift takes the signs off; of 16-bit types, what it leaves below the upper
// element of a pair decides between equals alone.
template <typename T>
__device__ uint32_t largest_magnitude(const Piece& piece) {
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    largest = max(largest, piece.word[i] << 1);
    if constexpr (sizeof(T) == 2) largest = max(largest, piece.word[i] << 17);
  }
  if constexpr (sizeof(T) == 4) {
    return largest >> 1;
  } else {
    return __float_as_uint(unpack_pair<T>(largest >> 1 & 0x7FFF0000u).y);
  }
}

// A piece that may be part of a partial block, not finite or not aligned: read again, byte by byte.
template <typename T>
__device__ __noinline__ void quantize_part(const Tables& tables, const T* input, int64_t left, float guarded, bool full,
                                           uint8_t* packed) {
  // Full blocks multiply by the reciprocal, a partial one divides: so do the bytes that checkpoints hold.
  const auto code_of = [&](int i) {
    const float value = i < left ? to_float(input[i]) : 0.0f;
    return encode_any(tables, full ? __fmul_rn(value, __frcp_rn(guarded)) : __fdiv_rn(value, guarded));
  };
#pragma unroll 1
  for (int i = 0; i < kElements<T> && i < left; i += 2) {
    packed[i / 2] = static_cast<uint8_t>(code_of(i) << 4 | code_of(i + 1));
  }
}

template <typename T, bool kIsFP4>
__global__ void __launch_bounds__(kThreads)
    quantize_4bit_kernel(const __grid_constant__ Quantizer quantizer, int blocksize_log2, const T* input, int64_t numel,
                         bool vector, uint8_t* packed, float* absmax) {
  __shared__ Tables tables;
  __shared__ uint32_t warp_largest[kPieces * kWarps];
  ptx::wait_for_previous_kernel();

  const int64_t tile = int64_t{blockIdx.x} * (kPieces * kRow<T>);
  const int in_row = threadIdx.x * kElements<T>;
  const int64_t left = numel - tile - in_row;  // from this thread's first element
  input += tile + in_row;
  packed += (tile + in_row) / 2;
  const bool whole = vector && tile + kPieces * kRow<T> <= numel;
  Piece piece[kPieces];
  if (whole) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) piece[i] = load_piece(input + i * kRow<T>);
  } else {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) piece[i] = load_part(input + i * kRow<T>, left - i * kRow<T>);
  }
  load_tables<kIsFP4>(tables, quantizer);

  uint32_t largest[kPieces];
#pragma unroll
  for (int i = 0; i < kPieces; ++i) largest[i] = largest_magnitude<T>(piece[i]);
  const int lanes = (1 << blocksize_log2) / kElements<T>;  // that share a quantization block
#pragma unroll 1
  for (int distance = 1; distance < min(lanes, 32); distance <<= 1) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      largest[i] = max(largest[i], __shfl_xor_sync(0xFFFFFFFFu, largest[i], distance));
    }
  }
  if (lanes > 32 && threadIdx.x % 32 == 0) {  // the quantization block spans lanes / 32 warps, perhaps of both rows
#pragma unroll
    for (int i = 0; i < kPieces; ++i) warp_largest[i * kWarps + threadIdx.x / 32] = largest[i];
  }
  __syncthreads();
  if (lanes > 32) {
    const int warps = lanes / 32;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int first = (i * kWarps + threadIdx.x / 32) & ~(warps - 1);
      for (int j = 0; j < warps; ++j) largest[i] = max(largest[i], warp_largest[first + j]);
    }
  }

  // A row is a whole number of blocks or a part of one: adding the place in the row to the row's never carries.
  const int mask = (1 << blocksize_log2) - 1;
  absmax += (tile >> blocksize_log2) + (in_row >> blocksize_log2);
  uint32_t largest_of_all = 0;
#pragma unroll
  for (int i = 0; i < kPieces; ++i) largest_of_all = max(largest_of_all, largest[i]);
  if (whole && largest_of_all < kInfinity) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const float true_absmax = __uint_as_float(largest[i]);
      if ((in_row + i * kRow<T> & mask) == 0) absmax[i * kRow<T> >> blocksize_log2] = true_absmax;
      const float reciprocal = __frcp_rn(fmaxf(true_absmax, kMinAbsmax));
      float value[kElements<T>];
      to_floats<T>(piece[i], value);
#pragma unroll
      for (int j = 0; j < kElements<T>; ++j) value[j] = __fmul_rn(value[j], reciprocal);
      uint8_t* output = packed + i * (kRow<T> / 2);
      if constexpr (sizeof(T) == 4) {
        *reinterpret_cast<uint32_t*>(output) = encode<kIsFP4>(tables, value);
      } else {
        *reinterpret_cast<uint2*>(output) =
            make_uint2(encode<kIsFP4>(tables, value), encode<kIsFP4>(tables, value + 8));
      }
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    if (left <= i * kRow<T>) return;
    const int in_block = in_row + i * kRow<T> & mask;
    const bool full = left - i * kRow<T> > mask - in_block;
    const float true_absmax = __uint_as_float(largest[i]);
    const float guarded = fmaxf(true_absmax, kMinAbsmax);
    if (in_block == 0) {
      // A partial block stores the guarded absmax, unless it is NaN, which fmaxf drops and the caller looks for.
      absmax[i * kRow<T> >> blocksize_log2] = full || largest[i] > kInfinity ? true_absmax : guarded;
    }
    quantize_part(tables, input + i * kRow<T>, left - i * kRow<T>, guarded, full, packed + i * (kRow<T> / 2));
  }
}

// x / 65535, rounded once, for an even x up to 131070: a quotient and its correction by the remainder. That this is the
// division's result was checked for all 65,536 arguments.
__device__ inline float divide_by_65535(float x) {
  constexpr float kReciprocal = 1.0f / 65535.0f;
  const float quotient = __fmul_rn(x, kReciprocal);
  return __fmaf_rn(__fmaf_rn(-quotient, 65535.0f, x), kReciprocal, quotient);
}

// 8-bit quantization as bitsandbytes' CPU backend does it: the normalised value is first rounded to one of 65536 equal
// steps of [-1, 1], and the step then gets the nearest code, the lower one of two as near. A warp takes 256 values.
__global__ void __launch_bounds__(kThreads)
    quantize_absmax_kernel(const float* absmax, int64_t blocks, const float* offset, const float* code,
                           uint8_t* absmax_codes, float* nested_absmax) {
  constexpr int kValues = kNestedBlocksize / 32;
  // Midpoints of neighbouring codes as a binary search tree, the children of i at 2i and 2i + 1: the first steps of a
  // search, taken by all lanes, then read neighbouring words instead of words of one bank.
  __shared__ float midpoint[256];
  ptx::wait_for_previous_kernel();
  const int thread = threadIdx.x;
  if (thread > 0) {
    const int depth = 31 - __clz(thread);
    const int sorted = ((2 * thread + 1) << (7 - depth)) - 257;
    midpoint[thread] = __fmul_rn(0.5f, __fadd_rn(code[sorted], code[sorted + 1]));
  }

  const int64_t nested = int64_t{blockIdx.x} * kWarps + thread / 32;
  const int64_t first = nested * kNestedBlocksize + thread % 32;
  const float mean = *offset;
  float value[kValues];
#pragma unroll
  for (int i = 0; i < kValues; ++i) value[i] = first + 32 * i < blocks ? __fsub_rn(absmax[first + 32 * i], mean) : 0.0f;
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kValues; ++i) largest = max(largest, __float_as_uint(value[i]) & 0x7FFFFFFFu);
#pragma unroll
  for (int distance = 16; distance > 0; distance >>= 1) {
    largest = max(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, distance));
  }
  __syncthreads();

  const float scale = __uint_as_float(largest);
  if (thread % 32 == 0 && first < blocks) nested_absmax[nested] = scale;
  const float reciprocal = __frcp_rn(scale);
  int node[kValues];
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    const float normalised = fminf(fmaxf(__fmul_rn(value[i], reciprocal), -1.0f), 1.0f);
    const float step = truncf(__fadd_rn(__fmul_rn(__fmul_rn(__fadd_rn(normalised, 1.0f), 0.5f), 65535.0f), 0.5f));
    value[i] = __fadd_rn(-1.0f, divide_by_65535(__fmul_rn(2.0f, step)));
    node[i] = 1;
  }
#pragma unroll
  for (int depth = 0; depth < 8; ++depth) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) node[i] = 2 * node[i] + (midpoint[node[i]] < value[i] ? 1 : 0);
  }
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    if (first + 32 * i < blocks) {
      absmax_codes[first + 32 * i] = scale == 0.0f ? uint8_t{0} : static_cast<uint8_t>(node[i] - 256);
    }
  }
}

}  // namespace

void quantize_4bit(DType dtype, const void* input, int64_t numel, QuantType type, int64_t blocksize, uint8_t* packed,
                   float* absmax, cudaStream_t stream) {
  if (numel <= 0) return;
  static const Quantizer quantizers[] = {make_quantizer(QuantType::kFP4), make_quantizer(QuantType::kNF4)};
  int blocksize_log2 = 0;
  while ((int64_t{1} << blocksize_log2) < blocksize) ++blocksize_log2;
  const bool vector = aligned_16(input) && reinterpret_cast<uintptr_t>(packed) % 8 == 0;
  const std::string problem = "of " + std::to_string(numel) + " elements in blocks of " + std::to_string(blocksize);
  with_element_type(dtype, [&](auto element) {
    using T = decltype(element);
    const bool is_fp4 = type == QuantType::kFP4;
    const unsigned grid = grid_size(ceil_div(numel, kPieces * kRow<T>), "quantize_4bit");
    launch_kernel("quantize_4bit", problem, {grid, kThreads, 0, stream, 1, true},
                  is_fp4 ? quantize_4bit_kernel<T, true> : quantize_4bit_kernel<T, false>, quantizers[is_fp4 ? 0 : 1],
                  blocksize_log2, static_cast<const T*>(input), numel, vector, packed, absmax);
  });
}

void quantize_absmax(const float* absmax, int64_t blocks, const float* offset, const float* code, uint8_t* absmax_codes,
                     float* nested_absmax, cudaStream_t stream) {
  if (blocks <= 0) return;
  const unsigned grid = grid_size(ceil_div(blocks, kNestedBlocksize * kWarps), "quantize_absmax");
  launch_kernel("quantize_absmax", "of " + std::to_string(blocks) + " values", {grid, kThreads, 0, stream, 1, true},
                quantize_absmax_kernel, absmax, blocks, offset, code, absmax_codes, nested_absmax);
}

}  // namespace pyquant::cuda
