// One matrix product for everything but a few rows: out[m, n] = scale · (Σ over terms of A·B) + bias, accumulated in
// float32. B is a 4-bit weight, decoded panel by panel and never held whole, or a dense matrix; A is dense.
//
// gemm.cpp cuts the work into tasks and owns the scratch memory. An Engine, one for each instruction set, packs panels
// of A and B into the layout it likes and multiplies them. How the reduction is cut is the engine's constant, so that
// an output's bits depend neither on the number of threads nor on the schedule.
#pragma once

#include "format/philox.h"
#include "format/quantized_matrix.h"

namespace pyquant::cpu {

// A dense operand, stored row-major: rows × depth for A, depth × columns for B, or the other way round if `transposed`.
// With dropout (of an untransposed operand) dropped elements count as zero; the scale of the kept ones is left to the
// caller.
struct Dense {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t stride = 0;  // elements from one stored row to the next
  bool transposed = false;
  const Dropout* dropout = nullptr;
};

// One term of the sum. Exactly one of b.data and weight is set. With a weight of n rows and k columns, B is Wᵀ (depth
// k, columns n) or, if weight_by_rows, W itself (depth n, columns k).
struct Term {
  int64_t depth = 0;
  Dense a;
  Dense b;
  const QuantizedMatrix* weight = nullptr;
  bool weight_by_rows = false;
};

struct Product {
  int64_t rows = 0;
  int64_t columns = 0;
  Term terms[2];  // the second one's depth may be 0
  // Dropout of the first term's sum, which is then multiplied by its scale: the low-rank term of a gradient.
  const Dropout* first_term_dropout = nullptr;
  float scale = 1.0f;
  const void* bias = nullptr;  // [columns], of the output's type
  DType dtype = DType::kFloat32;
  void* output = nullptr;
  bool output_transposed = false;  // stored as [columns, rows]
};

// What an instruction set contributes. A packed panel of A holds `tile_rows` rows, one of B `tile_columns` columns,
// each of `depth` elements of `element` bytes, padded with zeros where the matrix ends; panels follow one another at
// tile_rows (tile_columns) · depth_limit elements.
struct Engine {
  int64_t tile_rows;
  int64_t tile_columns;
  int64_t depth_limit;  // the reduction is cut into pieces of this many elements
  int64_t element;
  int64_t panel_rows;  // rows of A packed at a time

  void (*pack_a)(const Dense& a, int64_t row, int64_t rows, int64_t start, int64_t depth, void* to);
  void (*pack_b)(const Dense& b, int64_t column, int64_t columns, int64_t start, int64_t depth, void* to);
  void (*pack_weight)(const QuantizedMatrix& weight, int64_t row, int64_t rows, int64_t start, int64_t depth, void* to);
  void (*pack_weight_by_rows)(const QuantizedMatrix& weight, int64_t column, int64_t columns, int64_t start,
                              int64_t depth, void* to);
  // c[rows, columns] (+)= A · B; c has room for whole tiles.
  void (*multiply)(const void* a, const void* b, int64_t rows, int64_t columns, int64_t depth, float* c,
                   int64_t c_stride, bool accumulate);
  // The same straight from A's memory, where its layout serves: of the first rows, and returns how many. May be null.
  int64_t (*multiply_stored)(const Dense& a, int64_t row, int64_t rows, int64_t start, const void* b, int64_t columns,
                             int64_t depth, float* c, int64_t c_stride, bool accumulate);
  // c[i] = mask · scale · c[i] of `count` elements whose dropout index starts at `index`.
  void (*drop)(const Dropout& dropout, int64_t index, int64_t count, float* c);
  // to[offset..] = scale · c + bias[first..]
  void (*finish)(float* c, int64_t count, float scale, DType dtype, const void* bias, int64_t first, void* to,
                 int64_t offset);
};

extern const Engine kEnginePortable;
#if PYQUANT_X86
extern const Engine kEngineAvx2;
extern const Engine kEngineAvx512;
extern const Engine kEngineAmx;  // bfloat16 operands only
#endif

void multiply(const Product& product);

}  // namespace pyquant::cpu
