// The few-rows kernel for the instruction set of the including file. Internal linkage (isa.h).
#pragma once

#include "kernels/cpu/decode.h"
#include "kernels/cpu/gemv.h"

namespace pyquant::cpu {
namespace {

#if defined(__AVX2__)
constexpr int kGroupVecs = 32 / Vec::kLanes;
#endif

#if defined(__AVX512F__)

// Even and odd elements decode into registers of their own, so x is ordered likewise and nothing is interleaved.
inline void decode_group(const Table<float>& table, const uint8_t* bytes, Vec (&values)[kGroupVecs]) {
  const Indices indices(bytes);
  values[0].v = _mm512_permutexvar_ps(indices.even, table.entries);
  values[1].v = _mm512_permutexvar_ps(indices.odd, table.entries);
}

void order_x(DType dtype, const void* from, int64_t offset, int64_t count, float* to) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  alignas(64) float group[32];
  for (int64_t i = 0; i < count; i += 32) {
    load_row(dtype, from, offset + i, 32, group);
    const __m512 first = _mm512_load_ps(group), second = _mm512_load_ps(group + 16);
    _mm512_storeu_ps(to + i, _mm512_permutex2var_ps(first, even, second));
    _mm512_storeu_ps(to + i + 16, _mm512_permutex2var_ps(first, odd, second));
  }
}

#else

void order_x(DType dtype, const void* from, int64_t offset, int64_t count, float* to) {
  load_row(dtype, from, offset, count, to);
}

#if defined(__AVX2__)
inline void decode_group(const Table<float>& table, const uint8_t* bytes, Vec (&values)[kGroupVecs]) {
  for (int i = 0; i < kGroupVecs; ++i) values[i].v = table.look_up_8(bytes + 4 * i);
}
#endif

#endif

// Any weight: `kChunk` elements of a row are decoded at a time, in their natural order, which x then has too. Four sums
// for each row of x, so that no addition waits for another.
void dot_decoded_row(const FewRows& problem, int64_t row) {
  constexpr int64_t kChunk = 512;
  const QuantizedMatrix& weight = *problem.weight;
  alignas(64) float decoded[kChunk];
  Vec sum[kMaxFewRows][4];
  float rest[kMaxFewRows] = {};
  for (auto& sums : sum) {
    for (Vec& each : sums) each = Vec::zero();
  }
  for (int64_t start = 0; start < weight.k; start += kChunk) {
    const int64_t count = smaller(kChunk, weight.k - start);
    decode(weight, row * weight.k + start, count, decoded);
    for (int64_t i = 0; i < problem.m; ++i) {
      const float* x = problem.x + i * weight.k + start;
      int64_t j = 0;
      for (; j + 4 * Vec::kLanes <= count; j += 4 * Vec::kLanes) {
        for (int part = 0; part < 4; ++part) {
          const int64_t at = j + part * Vec::kLanes;
          sum[i][part].multiply_add(Vec::load(decoded + at), Vec::load(x + at));
        }
      }
      for (; j + Vec::kLanes <= count; j += Vec::kLanes) {
        sum[i][0].multiply_add(Vec::load(decoded + j), Vec::load(x + j));
      }
      for (; j < count; ++j) rest[i] += decoded[j] * x[j];
    }
  }
  for (int64_t i = 0; i < problem.m; ++i) {
    const float pairs = (sum[i][0].sum() + sum[i][1].sum()) + (sum[i][2].sum() + sum[i][3].sum());
    problem.y[i * weight.n + row] = pairs + rest[i];
  }
}

#if defined(__AVX2__)

// How many rows of the weight share the loads of x: as many as leave the accumulators in registers.
template <int kM>
constexpr int kRowsAtOnce = Vec::kLanes == 16 ? (kM <= 4   ? 4
                                                 : kM <= 6 ? 3
                                                           : 2)
                                              : (kM <= 2   ? 4
                                                 : kM <= 4 ? 2
                                                           : 1);

// Several rows are read in turn, more streams than the hardware's prefetcher keeps up with.
constexpr int64_t kPrefetch = 512;  // bytes ahead in the row

template <int kM, int kRows>
void dot_rows(const FewRows& problem, int64_t row) {
  const QuantizedMatrix& weight = *problem.weight;
  const float* values = values_of(weight.type);
  const int64_t k = weight.k;
  // A power of two that divides the rows and the blocks: no absmax changes inside it.
  const int64_t run = smaller(smaller(weight.blocksize, k & -k), 128);
  Vec sum[kRows][kM];
  for (int r = 0; r < kRows; ++r) {
    for (int i = 0; i < kM; ++i) sum[r][i] = Vec::zero();
  }
  for (int64_t start = 0; start < k; start += run) {
#pragma GCC unroll 4  // sums indexed by a loop's variable would live in memory
    for (int r = 0; r < kRows; ++r) {
      const int64_t element = (row + r) * k + start;
      const Table<float> table(values, block_absmax(weight, block_of(weight, element)));
      const uint8_t* bytes = weight.packed + element / 2;
      // Eight lanes leave long sums, so there each run has its own, which is then added to the row's.
      constexpr bool kSeparate = Vec::kLanes < 16;
      Vec run_sum[kM];
      for (Vec& each : run_sum) each = Vec::zero();
      for (int64_t group = 0; group < run; group += 32) {
        __builtin_prefetch(bytes + group / 2 + kPrefetch);
        Vec decoded[kGroupVecs];
        decode_group(table, bytes + group / 2, decoded);
        for (int i = 0; i < kM; ++i) {
          const float* x = problem.x + i * k + start + group;
          for (int part = 0; part < kGroupVecs; ++part) {
            Vec& to = kSeparate ? run_sum[i] : sum[r][i];
            to.multiply_add(decoded[part], Vec::load(x + part * Vec::kLanes));
          }
        }
      }
      if constexpr (kSeparate) {
        for (int i = 0; i < kM; ++i) sum[r][i].multiply_add(run_sum[i], Vec::broadcast(1.0f));
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int i = 0; i < kM; ++i) problem.y[i * weight.n + row + r] = sum[r][i].sum();
  }
}

template <int kM>
void dot_range(const FewRows& problem, int64_t begin, int64_t end) {
  constexpr int kRows = kRowsAtOnce<kM>;
  int64_t row = begin;
  for (; row + kRows <= end; row += kRows) dot_rows<kM, kRows>(problem, row);
  for (; row < end; ++row) dot_rows<kM, 1>(problem, row);
}

template <int kM>
void dot_m(const FewRows& problem, int64_t begin, int64_t end) {
  if constexpr (kM > 0) {
    if (problem.m == kM) return dot_range<kM>(problem, begin, end);
    dot_m<kM - 1>(problem, begin, end);
  }
}

#endif

void add_low_rank_and_bias(const FewRows& problem, int64_t begin, int64_t end) {
  constexpr int64_t kChunk = 64;
  float factor[kChunk];
  for (int64_t row = begin; row < end; ++row) {
    float* y = problem.y + row;
    for (int64_t start = 0; start < problem.rank; start += kChunk) {
      const int64_t count = smaller(kChunk, problem.rank - start);
      load_row(problem.dtype, problem.factor, row * problem.rank + start, count, factor);
      for (int64_t i = 0; i < problem.m; ++i) {
        const float* left = problem.left + i * problem.rank + start;
        Vec sum = Vec::zero();
        int64_t j = 0;
        for (; j + Vec::kLanes <= count; j += Vec::kLanes) sum.multiply_add(Vec::load(left + j), Vec::load(factor + j));
        float rest = 0.0f;
        for (; j < count; ++j) rest += left[j] * factor[j];
        y[i * problem.weight->n] += sum.sum() + rest;
      }
    }
    if (problem.bias != nullptr) {
      float bias;
      load_row(problem.dtype, problem.bias, row, 1, &bias);
      for (int64_t i = 0; i < problem.m; ++i) y[i * problem.weight->n] += bias;
    }
  }
}

void compute_rows(const FewRows& problem, int64_t begin, int64_t end) {
#if defined(__AVX2__)
  if (problem.aligned) {
    dot_m<kMaxFewRows>(problem, begin, end);
  } else {
    for (int64_t row = begin; row < end; ++row) dot_decoded_row(problem, row);
  }
#else
  for (int64_t row = begin; row < end; ++row) dot_decoded_row(problem, row);
#endif
  if (problem.rank > 0 || problem.bias != nullptr) add_low_rank_and_bias(problem, begin, end);
}

constexpr FewRowsKernel kFewRows = {order_x, load_row, compute_rows, store_row};

}  // namespace
}  // namespace pyquant::cpu
