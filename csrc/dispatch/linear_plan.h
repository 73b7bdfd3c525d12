// Which kernel a 4-bit linear runs on a GPU, and how it is cut up: a typed problem in, a typed plan out. Host code
// without CUDA, so that a plan can be printed anywhere.
#pragma once

#include <cstdint>
#include <string>
#include <tuple>

#include "format/quantized_matrix.h"

namespace pyquant {

enum class LinearDirection : int {
  kForward,  // y[m, n] = x[m, k] · Wᵀ
  kDx,       // dx[m, k] = dy[m, n] · W
};

struct LinearProblem {
  LinearDirection direction;
  int64_t m, n, k;  // W is [n, k]
  DType dtype;
  int64_t rank;      // of the low-rank term, 0 without one
  bool left_beside;  // the kernel launched just before, which computes its left factor, may run beside (LinearPlan)
  int64_t blocksize;
  int arch;     // 10 · major + minor
  bool sm_90a;  // the library has machine code for sm_90a
  int sm_count;
  bool aligned;  // pointers are 16-byte aligned: vector accesses wherever the shape allows them

  int64_t columns() const { return direction == LinearDirection::kForward ? n : k; }    // of the output
  int64_t reduction() const { return direction == LinearDirection::kForward ? k : n; }  // summed over

  bool operator==(const LinearProblem& other) const { return all() == other.all(); }

 private:
  std::tuple<LinearDirection, int64_t, int64_t, int64_t, DType, int64_t, bool, int64_t, int, bool, int, bool> all()
      const {
    return {direction, m, n, k, dtype, rank, left_beside, blocksize, arch, sm_90a, sm_count, aligned};
  }
};

enum class LinearKernel : int {
  kStream,   // 16-bit, few rows of x, Hopper: kFewRows at the rate of memory
  kFewRows,  // 16-bit, few rows of x, bandwidth-bound: tensor cores fed from a table of byte values
  kSmallM,   // 16-bit, few rows of x, bandwidth-bound: rows of W to warps, fp32 arithmetic
  kWgmma,    // 16-bit, Hopper's tensor cores
  kDense,    // the same by a weight that was dequantized to memory before: very many rows
  kMma,      // 16-bit, tensor cores through mma.sync
  kSimt,     // any type and shape, fp32 arithmetic
};

struct LinearPlan {
  LinearKernel kernel;
  int tile_m, tile_n, tile_k;  // of the output, and of one step along the reduction
  int split;  // kMma: blocks that share an output tile, each with a part of the reduction; kSmallM: warps likewise;
              // kStream, kWgmma: blocks of a cluster likewise
  double microseconds;  // the cost model's estimate, by which candidates are ranked, for the left factor as well
  bool share = false;   // kWgmma, kDense: pairs of blocks share the activations that they copy
  // kWgmma and kDense with a low-rank term: the kernel before, that computes its left factor, runs beside this one, in
  // blocks of that many rows, on multiprocessors that this one leaves free; 0: it has ended when this one begins.
  int beside = 0;

  // Blocks of the kernel beside, in whole clusters of cluster().
  int64_t blocks_beside(int64_t m, int64_t rank) const;
  int cluster() const { return share ? 2 : split; }

  // Bytes for the partial sums of a split reduction, or for the dequantized weight.
  int64_t workspace(const LinearProblem& problem) const;
};

// The best legal plan. PYQUANT_DENSE=0, when the process makes its first plan, leaves kDense out where it is not
// forced, and with it the memory that it takes. PYQUANT_KERNEL=stream, few_rows, small_m, wgmma, dense, mma or simt
// forces a kernel wherever it is legal, for tests; wgmma:128 its tile_m as well, wgmma:128:2 also the split,
// wgmma:128:2:64 also beside, to fit the cost model.
LinearPlan plan_linear(const LinearProblem& problem);

// With PYQUANT_LOG=plan, prints each distinct choice once to stderr.
void log_plan(const LinearProblem& problem, const LinearPlan& plan);

// One line: the problem, the kernel, the tiles and the estimate.
std::string describe(const LinearProblem& problem, const LinearPlan& plan);

}  // namespace pyquant
