// What the kernels of the LoRA products share: sums over one long dimension, with the rank as one of the output's
// sizes.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <optional>
#include <string>

#include "kernels/cuda/element.h"

namespace pyquant::cuda {

// output(i, j) = alpha · sum over s of large(i, s) · small(s, j), with i along the large operand and j along the rank.
struct SkinnyOutput {
  void* data;
  bool is_float;        // else the element type
  int64_t outer, rank;  // its two sizes
  int64_t outer_stride, rank_stride;
  float alpha;
};

template <typename T>
__device__ inline void store_skinny(const SkinnyOutput& output, int64_t i, int64_t j, float value) {
  if (i >= output.outer || j >= output.rank) return;
  const int64_t index = i * output.outer_stride + j * output.rank_stride;
  if (output.is_float) {
    static_cast<float*>(output.data)[index] = value * output.alpha;
  } else {
    static_cast<T*>(output.data)[index] = from_float<T>(value * output.alpha);
  }
}

struct SkinnyProblem {
  const void *large, *small;
  int64_t reduction;
  SkinnyOutput output;
  // The previous kernel, which let this one start only when all before it had ended, writes nothing that this one
  // reads: they run at the same time.
  bool beside_previous = false;
  // Where it runs beside the linear that follows: the rows of its blocks, and their cluster. See LinearPlan.
  int beside_rows = 0, beside_cluster = 1;
  const uint32_t* begun = nullptr;  // set by the kernel before, which rounded the factor: then not by this one
};

// A word that no other launch uses while this one is in flight, nor ever if the stream is being captured: a graph's
// launches may run whenever it is replayed. Null when none is left. (Two executable graphs made from one captured graph
// share their words: they must not run at the same time.)
uint32_t* next_word(cudaStream_t stream);

// Many rows on Hopper; nothing, and nothing launched, where it is not for the device, the type or the shape. Returns
// LowRank::begun (kernels.h). large_by_step: the large operand is [reduction, outer], else [outer, reduction];
// small_by_step: the small one is [reduction, rank], else [rank, reduction]. A large operand by steps goes with a small
// one by steps.
std::optional<const uint32_t*> lora_wgmma(const char* name, const std::string& problem, DType dtype, bool large_by_step,
                                          bool small_by_step, const SkinnyProblem& skinny, cudaStream_t stream);

}  // namespace pyquant::cuda
