// Hopper's tensor cores (sm_90a): wgmma. Asynchronous, by warpgroups of 128 threads.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "ptx/async_copy.h"

namespace pyquant::ptx {

// Before the first of a group of products, and after registers that they read or add to were written.
__device__ inline void fence_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ inline void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most `kPending` of the warpgroup's committed groups are unfinished.
template <int kPending>
__device__ inline void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// After wait_products: the compiler, which takes sums for known once a product is issued, does not read them earlier.
template <int kCount>
__device__ inline void hold_sums(float (&sum)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(sum[i])::"memory");
}

// Registers of the calling warpgroup's threads from the pool of the block, or back to it.
template <int kRegisters>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// The lower half of the description of a right operand in shared memory: [column][k], 64 k of 16 bits a row, copied
// there with 128-byte swizzle to a multiple of 1024 bytes. 16 k further is 2 more.
__device__ inline uint32_t operand_128(uint32_t address) { return uint32_t{1} << 16 | (address & 0x3FFFFu) >> 4; }

// The upper half: 1024 bytes from eight columns to the next eight, and the swizzle.
constexpr uint32_t kOperand128 = uint32_t{1} << 30 | 1024 / 16;

// sum[64, kColumns] += a[64, 16] * b[16, kColumns] in bf16 or fp16 with fp32 sums. Warp w of the warpgroup has rows
// 16 w .. 16 w + 15 of `a` and `sum`; with g = lane / 4 and t = lane % 4, a lane holds
//   a: (row g, k 2t..), (row g + 8, k 2t..), (row g, k 2t + 8..), (row g + 8, k 2t + 8..), two k a register;
//   sum[4 j + v]: row g + 8 (v / 2), column 8 j + 2 t + v % 2.
template <typename T, int kColumns>
struct Wgmma;

// The lists of operands, by sixteen: their numbers, and the sums they stand for.
#define PYQUANT_NUMBERS_0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define PYQUANT_NUMBERS_1 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define PYQUANT_NUMBERS_2 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define PYQUANT_NUMBERS_3 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define PYQUANT_NUMBERS_4 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define PYQUANT_NUMBERS_5 "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define PYQUANT_NUMBERS_6 "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define PYQUANT_NUMBERS_7 \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define PYQUANT_SUMS_4(i) "+f"(sum[i]), "+f"(sum[i + 1]), "+f"(sum[i + 2]), "+f"(sum[i + 3])
#define PYQUANT_SUMS_16(i) PYQUANT_SUMS_4(i), PYQUANT_SUMS_4(i + 4), PYQUANT_SUMS_4(i + 8), PYQUANT_SUMS_4(i + 12)
#define PYQUANT_SUMS_32(i) PYQUANT_SUMS_16(i), PYQUANT_SUMS_16(i + 16)
#define PYQUANT_SUMS_64(i) PYQUANT_SUMS_32(i), PYQUANT_SUMS_32(i + 32)
#define PYQUANT_SUMS_128(i) PYQUANT_SUMS_64(i), PYQUANT_SUMS_64(i + 64)

// `columns` of the instruction, its `count` sums, and the numbers of those and of the operands behind them.
#define PYQUANT_WGMMA(type, element, columns, count, numbers, a0, a1, a2, a3, b0, b1)                       \
  template <>                                                                                               \
  struct Wgmma<type, columns> {                                                                             \
    __device__ static void add(float (&sum)[count], const uint32_t* a, uint32_t b) {                        \
      asm volatile("{\n.reg .b64 right;\nmov.b64 right, {%" #b0 ", %" #b1                                   \
                   "};\n"                                                                                   \
                   "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." element "." element " {" numbers \
                   "}, "                                                                                    \
                   "{%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, right, 1, 1, 1, 0;\n}"                        \
                   : PYQUANT_SUMS_##count(0)                                                                \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "n"(kOperand128));                 \
    }                                                                                                       \
  };
#define PYQUANT_NUMBERS_32 PYQUANT_NUMBERS_0 ", " PYQUANT_NUMBERS_1
#define PYQUANT_NUMBERS_64 PYQUANT_NUMBERS_32 ", " PYQUANT_NUMBERS_2 ", " PYQUANT_NUMBERS_3
#define PYQUANT_NUMBERS_128 \
  PYQUANT_NUMBERS_64 ", " PYQUANT_NUMBERS_4 ", " PYQUANT_NUMBERS_5 ", " PYQUANT_NUMBERS_6 ", " PYQUANT_NUMBERS_7
#define PYQUANT_WGMMAS(type, element)                                               \
  PYQUANT_WGMMA(type, element, 32, 16, PYQUANT_NUMBERS_0, 16, 17, 18, 19, 20, 21)   \
  PYQUANT_WGMMA(type, element, 64, 32, PYQUANT_NUMBERS_32, 32, 33, 34, 35, 36, 37)  \
  PYQUANT_WGMMA(type, element, 128, 64, PYQUANT_NUMBERS_64, 64, 65, 66, 67, 68, 69) \
  PYQUANT_WGMMA(type, element, 256, 128, PYQUANT_NUMBERS_128, 128, 129, 130, 131, 132, 133)
PYQUANT_WGMMAS(__nv_bfloat16, "bf16")
PYQUANT_WGMMAS(__half, "f16")

// sum[64, kColumns] += a[64, 16] * b[16, kColumns], both from shared memory, described by operand_128. By rows of 64
// along the reduction, or where `kAcross...` by rows of 64 across it (then of `b` 64 columns): 16 further along it are
// then 16 rows, 2048 bytes.
template <typename T, int kColumns, bool kAcrossA, bool kAcrossB>
__device__ inline void multiply(float (&sum)[kColumns / 2], uint32_t a, uint32_t b) {
  static_assert(kColumns == 64 || (kColumns == 256 && !kAcrossB));
#define PYQUANT_MULTIPLY(element, columns, count, a0, b0, upper, across_a, across_b)                                   \
  asm volatile("{\n.reg .b64 left, right;\nmov.b64 left, {%" #a0 ", %" #upper "};\nmov.b64 right, {%" #b0 ", %" #upper \
               "};\nwgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." element "." element                         \
               " {" PYQUANT_NUMBERS_##count "}, left, right, 1, 1, 1, %" #across_a ", %" #across_b ";\n}"              \
               : PYQUANT_SUMS_##count(0)                                                                               \
               : "r"(a), "r"(b), "n"(kOperand128), "n"(kAcrossA ? 1 : 0), "n"(kAcrossB ? 1 : 0))
#define PYQUANT_MULTIPLY_COLUMNS(element)                         \
  if constexpr (kColumns == 64) {                                 \
    PYQUANT_MULTIPLY(element, 64, 32, 32, 33, 34, 35, 36);        \
  } else {                                                        \
    PYQUANT_MULTIPLY(element, 256, 128, 128, 129, 130, 131, 132); \
  }
  if constexpr (std::is_same_v<T, __half>) {
    PYQUANT_MULTIPLY_COLUMNS("f16")
  } else {
    PYQUANT_MULTIPLY_COLUMNS("bf16")
  }
#undef PYQUANT_MULTIPLY_COLUMNS
#undef PYQUANT_MULTIPLY
}
#undef PYQUANT_WGMMAS
#undef PYQUANT_WGMMA
#undef PYQUANT_SUMS_4
#undef PYQUANT_SUMS_16
#undef PYQUANT_SUMS_32
#undef PYQUANT_SUMS_64
#undef PYQUANT_SUMS_128
#undef PYQUANT_NUMBERS_0
#undef PYQUANT_NUMBERS_1
#undef PYQUANT_NUMBERS_2
#undef PYQUANT_NUMBERS_3
#undef PYQUANT_NUMBERS_4
#undef PYQUANT_NUMBERS_5
#undef PYQUANT_NUMBERS_6
#undef PYQUANT_NUMBERS_7
#undef PYQUANT_NUMBERS_32
#undef PYQUANT_NUMBERS_64
#undef PYQUANT_NUMBERS_128

}  // namespace pyquant::ptx
