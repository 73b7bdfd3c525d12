// The engine that multiplies in float32, for the instruction set of the including file. Internal linkage (isa.h).
//
// A is packed a row at a time, because its elements are only ever broadcast: a panel is kDepth consecutive elements of
// one row after another. B is packed depth first: kColumns elements of one depth after another.
#pragma once

#include "kernels/cpu/panels.h"

#if defined(__AVX512F__)
#include "kernels/cpu/strip.h"
#endif

namespace pyquant::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kTileRows = 14;  // 28 accumulators, two registers of B, one broadcast: of 32
#elif defined(__AVX2__)
constexpr int kTileRows = 6;  // 12 of 16
#else
constexpr int kTileRows = 4;
#endif
constexpr int kTileColumns = 2 * Vec::kLanes;
constexpr int64_t kDepth = 256;  // a panel of B then fits the first-level cache beside one of A

void pack_a(const Dense& a, int64_t row, int64_t rows, int64_t start, int64_t depth, void* to) {
  float* out = static_cast<float*>(to);
  if (!a.transposed) {
    for (int64_t i = 0; i < rows; ++i) load_dense(a, row + i, start, depth, out + i * kDepth);
    return;
  }
  float buffer[kRowChunk];
  for (int64_t d = 0; d < depth; ++d) {
    for (int64_t done = 0; done < rows; done += kRowChunk) {
      const int64_t n = smaller(kRowChunk, rows - done);
      load_dense(a, start + d, row + done, n, buffer);
      for (int64_t i = 0; i < n; ++i) out[(done + i) * kDepth + d] = buffer[i];
    }
  }
}

// Column j of a panel from a row of `depth` floats; a null row gives zeros.
inline void scatter_column(const float* from, int64_t depth, int64_t j, float* panel) {
  for (int64_t d = 0; d < depth; ++d) panel[d * kTileColumns + j] = from == nullptr ? 0.0f : from[d];
}

// Panels whose columns are rows in memory: read(column, to) gives `depth` floats of one.
template <typename Read>
void pack_transposed(int64_t columns, int64_t depth, const Read& read, float* out) {
  float buffer[kDepth];
  for (int64_t j = 0; j < round_up(columns, kTileColumns); ++j) {
    float* panel = out + j / kTileColumns * kTileColumns * kDepth;
    if (j < columns) read(j, buffer);
    scatter_column(j < columns ? buffer : nullptr, depth, j % kTileColumns, panel);
  }
}

void pack_b(const Dense& b, int64_t column, int64_t columns, int64_t start, int64_t depth, void* to) {
  float* out = static_cast<float*>(to);
  if (b.transposed) {
    pack_transposed(columns, depth, [&](int64_t j, float* row) { load_dense(b, column + j, start, depth, row); }, out);
  } else {
    // Whole rows first: dropout's draws come cheaper in long runs.
    float buffer[kRowChunk];
    for (int64_t done = 0; done < columns; done += kRowChunk) {
      const int64_t n = smaller(kRowChunk, columns - done);
      for (int64_t d = 0; d < depth; ++d) {
        load_dense(b, start + d, column + done, n, buffer);
        for (int64_t first = 0; first < n; first += kTileColumns) {
          float* panel = out + (done + first) * kDepth + d * kTileColumns;
          const int64_t count = smaller(kTileColumns, n - first);
          for (int64_t j = 0; j < kTileColumns; ++j) panel[j] = j < count ? buffer[first + j] : 0.0f;
        }
      }
    }
  }
}

#if defined(__AVX512F__)

void pack_strip(const QuantizedMatrix& weight, int64_t row, int64_t start, int64_t depth, float* out) {
  const __m512 values = _mm512_loadu_ps(values_of(weight.type));
  const int64_t run = constant_run(weight);
  __m512 absmax = _mm512_setzero_ps();
  for (int64_t d = 0; d < depth; d += 32) {
    if (d % run == 0) absmax = strip_absmax(weight, row, start + d);
    const Strip strip(weight.packed + (row * weight.k + start + d) / 2, weight.k / 2);
    for (int w = 0; w < 4; ++w) {
      const auto store = [&](int at, __m512i indices) {
        const __m512 decoded = _mm512_mul_ps(_mm512_permutexvar_ps(indices, values), absmax);
        _mm512_storeu_ps(out + (d + 8 * w + at) * kTileColumns, decoded);
      };
      store(0, _mm512_srli_epi32(strip.words[w], 4));
      store(1, strip.words[w]);
      store(2, _mm512_srli_epi32(strip.words[w], 12));
      store(3, _mm512_srli_epi32(strip.words[w], 8));
      store(4, _mm512_srli_epi32(strip.words[w], 20));
      store(5, _mm512_srli_epi32(strip.words[w], 16));
      store(6, _mm512_srli_epi32(strip.words[w], 28));
      store(7, _mm512_srli_epi32(strip.words[w], 24));
    }
  }
}

#endif

void pack_weight(const QuantizedMatrix& weight, int64_t row, int64_t rows, int64_t start, int64_t depth, void* to) {
  float* out = static_cast<float*>(to);
  int64_t done = 0;
#if defined(__AVX512F__)
  if (aligned(weight)) {
    for (; done + 16 <= rows; done += 16) {
      pack_strip(weight, row + done, start, depth,
                 out + done / kTileColumns * kTileColumns * kDepth + done % kTileColumns);
    }
  }
#endif
  float buffer[kDepth];
  for (int64_t j = done; j < round_up(rows, kTileColumns); ++j) {
    if (j < rows) decode(weight, (row + j) * weight.k + start, depth, buffer);
    scatter_column(j < rows ? buffer : nullptr, depth, j % kTileColumns,
                   out + j / kTileColumns * kTileColumns * kDepth);
  }
}

void pack_weight_by_rows(const QuantizedMatrix& weight, int64_t column, int64_t columns, int64_t start, int64_t depth,
                         void* to) {
  float buffer[kRowChunk];
  float* out = static_cast<float*>(to);
  for (int64_t done = 0; done < columns; done += kRowChunk) {
    const int64_t n = smaller(kRowChunk, columns - done);
    for (int64_t d = 0; d < depth; ++d) {
      decode(weight, (start + d) * weight.k + column + done, n, buffer);
      for (int64_t first = 0; first < n; first += kTileColumns) {
        float* panel = out + (done + first) * kDepth + d * kTileColumns;
        const int64_t count = smaller(kTileColumns, n - first);
        for (int64_t j = 0; j < kTileColumns; ++j) panel[j] = j < count ? buffer[first + j] : 0.0f;
      }
    }
  }
}

// With few rows there are registers for several sums of each output: additions wait less for one another, and shorter
// sums lose less, which a product of one row needs to stay as exact as a plain dot product.
template <int kRows>
void multiply_tile(const float* a, const float* b, int64_t depth, float* c, int64_t c_stride, bool accumulate) {
  constexpr int kSums = kRows * 4 <= kTileRows + 2 ? 4 : kRows * 2 <= kTileRows ? 2 : 1;
  Vec sum[kSums][kRows][2];
  for (auto& each : sum) {
    for (int i = 0; i < kRows; ++i) each[i][0] = each[i][1] = Vec::zero();
  }
  const auto add_depth = [&](int64_t d, Vec(&to)[kRows][2]) {
    const Vec b0 = Vec::load(b + d * kTileColumns), b1 = Vec::load(b + d * kTileColumns + Vec::kLanes);
    for (int i = 0; i < kRows; ++i) {
      const Vec value = Vec::broadcast(a[i * kDepth + d]);
      to[i][0].multiply_add(value, b0);
      to[i][1].multiply_add(value, b1);
    }
  };
  int64_t d = 0;
  for (; d + kSums <= depth; d += kSums) {
    for (int part = 0; part < kSums; ++part) add_depth(d + part, sum[part]);
  }
  for (; d < depth; ++d) add_depth(d, sum[0]);
  const Vec one = Vec::broadcast(1.0f);
  for (int i = 0; i < kRows; ++i) {
    for (int half = 0; half < 2; ++half) {
      for (int step = kSums / 2; step > 0; step /= 2) {
        for (int part = 0; part < step; ++part) {
          sum[part][i][half].multiply_add(sum[part + step][i][half], one);
        }
      }
      float* to = c + i * c_stride + half * Vec::kLanes;
      if (accumulate) sum[0][i][half].multiply_add(Vec::load(to), one);
      sum[0][i][half].store(to);
    }
  }
}

using MultiplyTile = void (*)(const float*, const float*, int64_t, float*, int64_t, bool);

template <int kRows>
MultiplyTile tile_of(int64_t rows) {
  if constexpr (kRows == 1) {
    return multiply_tile<1>;
  } else {
    return rows == kRows ? multiply_tile<kRows> : tile_of<kRows - 1>(rows);
  }
}

void multiply_panels(const void* a, const void* b, int64_t rows, int64_t columns, int64_t depth, float* c,
                     int64_t c_stride, bool accumulate) {
  for (int64_t column = 0; column < columns; column += kTileColumns) {
    for (int64_t row = 0; row < rows; row += kTileRows) {
      tile_of<kTileRows>(smaller(kTileRows, rows - row))(static_cast<const float*>(a) + row * kDepth,
                                                         static_cast<const float*>(b) + column * kDepth, depth,
                                                         c + row * c_stride + column, c_stride, accumulate);
    }
  }
}

constexpr Engine kEngine = {kTileRows,   kTileColumns,        kDepth,          4,       8 * kTileRows, pack_a, pack_b,
                            pack_weight, pack_weight_by_rows, multiply_panels, nullptr, drop,          finish};

}  // namespace
}  // namespace pyquant::cpu
