// The tensor cores through mma.sync (sm_80 and later): 16 × 8 × 16 in bf16 or fp16 with fp32 accumulators, and
// ldmatrix, which loads their operands from shared memory.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "ptx/async_copy.h"

namespace pyquant::ptx {

// One warp's operands. With g = lane / 4 and t = lane % 4, a lane holds
//   FragA: (row g, k 2t..), (row g + 8, k 2t..), (row g, k 2t + 8..), (row g + 8, k 2t + 8..), two k a register;
//   FragB: (k 2t.., column g), (k 2t + 8.., column g), two k a register;
//   FragC: (row g, columns 2t, 2t + 1), (row g + 8, columns 2t, 2t + 1).
struct FragA {
  uint32_t reg[4];
};
struct FragB {
  uint32_t reg[2];
};
struct FragC {
  float value[4];
};

// Four 8 × 8 matrices of 16-bit elements; lane 8i + j gives the address of row j of matrix i. Register i of a lane
// holds elements 2t, 2t + 1 of row g of matrix i; transposed, elements g of rows 2t and 2t + 1.
template <bool kTransposed>
__device__ inline void load_matrices(uint32_t (&reg)[4], const void* row) {
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(reg[0]), "=r"(reg[1]), "=r"(reg[2]), "=r"(reg[3])
                 : "r"(shared_address(row))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(reg[0]), "=r"(reg[1]), "=r"(reg[2]), "=r"(reg[3])
                 : "r"(shared_address(row))
                 : "memory");
  }
}

template <typename T>
__device__ void mma(FragC& c, const FragA& a, const FragB& b);

template <>
__device__ inline void mma<__nv_bfloat16>(FragC& c, const FragA& a, const FragB& b) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c.value[0]), "+f"(c.value[1]), "+f"(c.value[2]), "+f"(c.value[3])
      : "r"(a.reg[0]), "r"(a.reg[1]), "r"(a.reg[2]), "r"(a.reg[3]), "r"(b.reg[0]), "r"(b.reg[1]));
}

template <>
__device__ inline void mma<__half>(FragC& c, const FragA& a, const FragB& b) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c.value[0]), "+f"(c.value[1]), "+f"(c.value[2]), "+f"(c.value[3])
      : "r"(a.reg[0]), "r"(a.reg[1]), "r"(a.reg[2]), "r"(a.reg[3]), "r"(b.reg[0]), "r"(b.reg[1]));
}

}  // namespace pyquant::ptx
