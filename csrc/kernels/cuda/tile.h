// Row-major matrices, their tiles in shared memory (16-bit types), and the tensor cores' operands out of them.
#pragma once

#include "kernels/cuda/dropout.h"
#include "kernels/cuda/element.h"
#include "ptx/async_copy.h"
#include "ptx/mma.h"

namespace pyquant::cuda {

// A row-major matrix [rows, columns] in global memory. `vector`: 16-byte aligned, and so is every row.
template <typename T>
struct Dense {
  const T* data;
  int64_t rows, columns;
  bool vector;
};

template <typename T>
Dense<T> make_dense(const void* data, int64_t rows, int64_t columns) {
  return {static_cast<const T*>(data), rows, columns,
          reinterpret_cast<uintptr_t>(data) % 16 == 0 && columns % (16 / sizeof(T)) == 0};
}

// Rows of a tile are padded by 16 bytes: an odd number of 16-byte units, so that the eight rows of an ldmatrix matrix
// lie in different banks.
constexpr int padded(int columns) { return columns + 8; }

// Starts copying rows [row0, row0 + kRows) and columns [column0, column0 + kColumns) of `source` to `tile`, zeros where
// the matrix ends. A thread copies 16-byte chunks; `commit_copies` and a barrier are the caller's.
template <int kRows, int kColumns, int kThreads, typename T>
__device__ void load_tile(T* tile, const Dense<T>& source, int64_t row0, int64_t column0) {
  constexpr int kChunks = kColumns / 8;
  static_assert(kRows * kChunks % kThreads == 0 || kRows * kChunks < kThreads);
  if (source.vector) {
#pragma unroll
    for (int i = 0; i < (kRows * kChunks + kThreads - 1) / kThreads; ++i) {
      const int chunk = threadIdx.x + i * kThreads;
      if (kRows * kChunks < kThreads && chunk >= kRows * kChunks) break;
      const int row = chunk / kChunks, column = chunk % kChunks * 8;
      const bool inside = row0 + row < source.rows && column0 + column < source.columns;
      const T* from = source.data + (inside ? (row0 + row) * source.columns + column0 + column : 0);
      ptx::copy_16_async(tile + row * padded(kColumns) + column, from, inside);
    }
  } else {
#pragma unroll 1
    for (int chunk = threadIdx.x; chunk < kRows * kChunks; chunk += kThreads) {
      const int row = chunk / kChunks, column = chunk % kChunks * 8;
      const T* from = source.data + (row0 + row) * source.columns + column0 + column;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const bool inside = row0 + row < source.rows && column0 + column + i < source.columns;
        tile[row * padded(kColumns) + column + i] = inside ? from[i] : from_float<T>(0.0f);
      }
    }
  }
}

// Zeroes the dropped elements of a tile that `load_tile` brought: every thread those that it copied itself, so that
// only its own copies need to have arrived. The mask's scale is left to the epilogue.
template <int kRows, int kColumns, int kThreads, typename T>
__device__ void drop_elements(T* tile, const Dense<T>& source, int64_t row0, int64_t column0, uint64_t seed,
                              uint32_t threshold) {
  constexpr int kChunks = kColumns / 8;
#pragma unroll 1
  for (int chunk = threadIdx.x; chunk < kRows * kChunks; chunk += kThreads) {
    const int row = chunk / kChunks, column = chunk % kChunks * 8;
    if (row0 + row >= source.rows || column0 + column >= source.columns) continue;
    const int64_t index = (row0 + row) * source.columns + column0 + column;
    uint32_t kept = 0;
    if (source.vector) {
      kept = keeps_8(seed, threshold, index);
    } else {
#pragma unroll 1
      for (int i = 0; i < 8; ++i) kept |= (keeps(seed, threshold, index + i) ? 1u : 0u) << i;
    }
    uint4* words = reinterpret_cast<uint4*>(tile + row * padded(kColumns) + column);
    const auto select = [&](uint32_t word, int pair) {
      return word & (((kept >> 2 * pair & 1u) != 0 ? 0x0000FFFFu : 0u) |
                     ((kept >> (2 * pair + 1) & 1u) != 0 ? 0xFFFF0000u : 0u));
    };
    const uint4 word = *words;
    *words = make_uint4(select(word.x, 0), select(word.y, 1), select(word.z, 2), select(word.w, 3));
  }
}

// Where lane `lane` points ldmatrix for a 16 × 16 operand whose corner is (outer0, k0), outer being m of A or n of B.
// The tile is [outer][k], or with kTransposed [k][outer].
//
// A's registers want the order (outer 0, k 0), (outer 8, k 0), (outer 0, k 8), (outer 8, k 8); B's two operands of
// 8 columns each want (outer 0, k 0), (outer 0, k 8), (outer 8, k 0), (outer 8, k 8).
template <bool kIsA, bool kTransposed>
PYQUANT_HOST_DEVICE constexpr int operand_offset(int lane, int outer0, int k0, int pitch) {
  const int matrix = lane / 8, row = lane % 8;
  const int outer = outer0 + (kIsA ? matrix % 2 : matrix / 2) * 8;
  const int k = k0 + (kIsA ? matrix / 2 : matrix % 2) * 8;
  return kTransposed ? (k + row) * pitch + outer : (outer + row) * pitch + k;
}

template <bool kTransposed, typename T>
__device__ ptx::FragA load_a(const T* tile, int pitch, int outer0, int k0) {
  ptx::FragA a;
  ptx::load_matrices<kTransposed>(a.reg, tile + operand_offset<true, kTransposed>(threadIdx.x % 32, outer0, k0, pitch));
  return a;
}

// Two operands: columns [outer0, outer0 + 8) and [outer0 + 8, outer0 + 16).
template <bool kTransposed, typename T>
__device__ void load_b(const T* tile, int pitch, int outer0, int k0, ptx::FragB& first, ptx::FragB& second) {
  uint32_t reg[4];
  ptx::load_matrices<kTransposed>(reg, tile + operand_offset<false, kTransposed>(threadIdx.x % 32, outer0, k0, pitch));
  first.reg[0] = reg[0], first.reg[1] = reg[1];
  second.reg[0] = reg[2], second.reg[1] = reg[3];
}

}  // namespace pyquant::cuda
