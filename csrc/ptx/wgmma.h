// Hopper's tensor cores (sm_90a): wgmma with the left operand in registers. Asynchronous, by warpgroups of 128 threads.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

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

#define PYQUANT_WGMMA_32(type)                                                                                \
  asm volatile(                                                                                               \
      "{\n.reg .b64 right;\nmov.b64 right, {%20, %21};\n"                                                     \
      "wgmma.mma_async.sync.aligned.m64n32k16.f32." type "." type                                             \
      " {"                                                                                                    \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "                               \
      "{%16, %17, %18, %19}, right, 1, 1, 1, 0;\n}"                                                           \
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3]), "+f"(sum[4]), "+f"(sum[5]), "+f"(sum[6]),     \
        "+f"(sum[7]), "+f"(sum[8]), "+f"(sum[9]), "+f"(sum[10]), "+f"(sum[11]), "+f"(sum[12]), "+f"(sum[13]), \
        "+f"(sum[14]), "+f"(sum[15])                                                                          \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "n"(kOperand128))
template <>
struct Wgmma<__nv_bfloat16, 32> {
  __device__ static void add(float (&sum)[16], const uint32_t* a, uint32_t b) { PYQUANT_WGMMA_32("bf16"); }
};
template <>
struct Wgmma<__half, 32> {
  __device__ static void add(float (&sum)[16], const uint32_t* a, uint32_t b) { PYQUANT_WGMMA_32("f16"); }
};
#undef PYQUANT_WGMMA_32

#define PYQUANT_WGMMA_64(type)                                                                                   \
  asm volatile(                                                                                                  \
      "{\n.reg .b64 right;\nmov.b64 right, {%36, %37};\n"                                                        \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                                                \
      " {"                                                                                                       \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                   \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "                        \
      "{%32, %33, %34, %35}, right, 1, 1, 1, 0;\n}"                                                              \
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3]), "+f"(sum[4]), "+f"(sum[5]), "+f"(sum[6]),        \
        "+f"(sum[7]), "+f"(sum[8]), "+f"(sum[9]), "+f"(sum[10]), "+f"(sum[11]), "+f"(sum[12]), "+f"(sum[13]),    \
        "+f"(sum[14]), "+f"(sum[15]), "+f"(sum[16]), "+f"(sum[17]), "+f"(sum[18]), "+f"(sum[19]), "+f"(sum[20]), \
        "+f"(sum[21]), "+f"(sum[22]), "+f"(sum[23]), "+f"(sum[24]), "+f"(sum[25]), "+f"(sum[26]), "+f"(sum[27]), \
        "+f"(sum[28]), "+f"(sum[29]), "+f"(sum[30]), "+f"(sum[31])                                               \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "n"(kOperand128))
template <>
struct Wgmma<__nv_bfloat16, 64> {
  __device__ static void add(float (&sum)[32], const uint32_t* a, uint32_t b) { PYQUANT_WGMMA_64("bf16"); }
};
template <>
struct Wgmma<__half, 64> {
  __device__ static void add(float (&sum)[32], const uint32_t* a, uint32_t b) { PYQUANT_WGMMA_64("f16"); }
};
#undef PYQUANT_WGMMA_64

#define PYQUANT_WGMMA_128(type)                                                                                  \
  asm volatile(                                                                                                  \
      "{\n.reg .b64 right;\nmov.b64 right, {%68, %69};\n"                                                        \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                                               \
      " {"                                                                                                       \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                   \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                         \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                         \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "                        \
      "{%64, %65, %66, %67}, right, 1, 1, 1, 0;\n}"                                                              \
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3]), "+f"(sum[4]), "+f"(sum[5]), "+f"(sum[6]),        \
        "+f"(sum[7]), "+f"(sum[8]), "+f"(sum[9]), "+f"(sum[10]), "+f"(sum[11]), "+f"(sum[12]), "+f"(sum[13]),    \
        "+f"(sum[14]), "+f"(sum[15]), "+f"(sum[16]), "+f"(sum[17]), "+f"(sum[18]), "+f"(sum[19]), "+f"(sum[20]), \
        "+f"(sum[21]), "+f"(sum[22]), "+f"(sum[23]), "+f"(sum[24]), "+f"(sum[25]), "+f"(sum[26]), "+f"(sum[27]), \
        "+f"(sum[28]), "+f"(sum[29]), "+f"(sum[30]), "+f"(sum[31]), "+f"(sum[32]), "+f"(sum[33]), "+f"(sum[34]), \
        "+f"(sum[35]), "+f"(sum[36]), "+f"(sum[37]), "+f"(sum[38]), "+f"(sum[39]), "+f"(sum[40]), "+f"(sum[41]), \
        "+f"(sum[42]), "+f"(sum[43]), "+f"(sum[44]), "+f"(sum[45]), "+f"(sum[46]), "+f"(sum[47]), "+f"(sum[48]), \
        "+f"(sum[49]), "+f"(sum[50]), "+f"(sum[51]), "+f"(sum[52]), "+f"(sum[53]), "+f"(sum[54]), "+f"(sum[55]), \
        "+f"(sum[56]), "+f"(sum[57]), "+f"(sum[58]), "+f"(sum[59]), "+f"(sum[60]), "+f"(sum[61]), "+f"(sum[62]), \
        "+f"(sum[63])                                                                                            \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "n"(kOperand128))
template <>
struct Wgmma<__nv_bfloat16, 128> {
  __device__ static void add(float (&sum)[64], const uint32_t* a, uint32_t b) { PYQUANT_WGMMA_128("bf16"); }
};
template <>
struct Wgmma<__half, 128> {
  __device__ static void add(float (&sum)[64], const uint32_t* a, uint32_t b) { PYQUANT_WGMMA_128("f16"); }
};
#undef PYQUANT_WGMMA_128

#define PYQUANT_WGMMA_256(type)                                                                                       \
  asm volatile(                                                                                                       \
      "{\n.reg .b64 right;\nmov.b64 right, {%132, %133};\n"                                                           \
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type                                                    \
      " {"                                                                                                            \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                        \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                              \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                              \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "                              \
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "                              \
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "                              \
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "                  \
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "             \
      "{%128, %129, %130, %131}, right, 1, 1, 1, 0;\n}"                                                               \
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3]), "+f"(sum[4]), "+f"(sum[5]), "+f"(sum[6]),             \
        "+f"(sum[7]), "+f"(sum[8]), "+f"(sum[9]), "+f"(sum[10]), "+f"(sum[11]), "+f"(sum[12]), "+f"(sum[13]),         \
        "+f"(sum[14]), "+f"(sum[15]), "+f"(sum[16]), "+f"(sum[17]), "+f"(sum[18]), "+f"(sum[19]), "+f"(sum[20]),      \
        "+f"(sum[21]), "+f"(sum[22]), "+f"(sum[23]), "+f"(sum[24]), "+f"(sum[25]), "+f"(sum[26]), "+f"(sum[27]),      \
        "+f"(sum[28]), "+f"(sum[29]), "+f"(sum[30]), "+f"(sum[31]), "+f"(sum[32]), "+f"(sum[33]), "+f"(sum[34]),      \
        "+f"(sum[35]), "+f"(sum[36]), "+f"(sum[37]), "+f"(sum[38]), "+f"(sum[39]), "+f"(sum[40]), "+f"(sum[41]),      \
        "+f"(sum[42]), "+f"(sum[43]), "+f"(sum[44]), "+f"(sum[45]), "+f"(sum[46]), "+f"(sum[47]), "+f"(sum[48]),      \
        "+f"(sum[49]), "+f"(sum[50]), "+f"(sum[51]), "+f"(sum[52]), "+f"(sum[53]), "+f"(sum[54]), "+f"(sum[55]),      \
        "+f"(sum[56]), "+f"(sum[57]), "+f"(sum[58]), "+f"(sum[59]), "+f"(sum[60]), "+f"(sum[61]), "+f"(sum[62]),      \
        "+f"(sum[63]), "+f"(sum[64]), "+f"(sum[65]), "+f"(sum[66]), "+f"(sum[67]), "+f"(sum[68]), "+f"(sum[69]),      \
        "+f"(sum[70]), "+f"(sum[71]), "+f"(sum[72]), "+f"(sum[73]), "+f"(sum[74]), "+f"(sum[75]), "+f"(sum[76]),      \
        "+f"(sum[77]), "+f"(sum[78]), "+f"(sum[79]), "+f"(sum[80]), "+f"(sum[81]), "+f"(sum[82]), "+f"(sum[83]),      \
        "+f"(sum[84]), "+f"(sum[85]), "+f"(sum[86]), "+f"(sum[87]), "+f"(sum[88]), "+f"(sum[89]), "+f"(sum[90]),      \
        "+f"(sum[91]), "+f"(sum[92]), "+f"(sum[93]), "+f"(sum[94]), "+f"(sum[95]), "+f"(sum[96]), "+f"(sum[97]),      \
        "+f"(sum[98]), "+f"(sum[99]), "+f"(sum[100]), "+f"(sum[101]), "+f"(sum[102]), "+f"(sum[103]), "+f"(sum[104]), \
        "+f"(sum[105]), "+f"(sum[106]), "+f"(sum[107]), "+f"(sum[108]), "+f"(sum[109]), "+f"(sum[110]),               \
        "+f"(sum[111]), "+f"(sum[112]), "+f"(sum[113]), "+f"(sum[114]), "+f"(sum[115]), "+f"(sum[116]),               \
        "+f"(sum[117]), "+f"(sum[118]), "+f"(sum[119]), "+f"(sum[120]), "+f"(sum[121]), "+f"(sum[122]),               \
        "+f"(sum[123]), "+f"(sum[124]), "+f"(sum[125]), "+f"(sum[126]), "+f"(sum[127])                                \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "n"(kOperand128))
template <>
struct Wgmma<__nv_bfloat16, 256> {
  __device__ static void add(float (&sum)[128], const uint32_t* a, uint32_t b) { PYQUANT_WGMMA_256("bf16"); }
};
template <>
struct Wgmma<__half, 256> {
  __device__ static void add(float (&sum)[128], const uint32_t* a, uint32_t b) { PYQUANT_WGMMA_256("f16"); }
};
#undef PYQUANT_WGMMA_256

}  // namespace pyquant::ptx
