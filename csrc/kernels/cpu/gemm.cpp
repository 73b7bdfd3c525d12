#include "kernels/cpu/gemm.h"

#include <algorithm>

#include "kernels/cpu/isa.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/scalar.h"
#include "kernels/cpu/scratch.h"

namespace pyquant::cpu {
namespace {

enum Slot { kSlotA, kSlotB, kSlotC };

[[maybe_unused]] bool all_bfloat16(const Product& product) {
  for (const Term& term : product.terms) {
    if (term.depth == 0) continue;
    if (term.a.dtype != DType::kBFloat16) return false;
    if (term.weight == nullptr && term.b.dtype != DType::kBFloat16) return false;
  }
  return true;
}

const Engine& engine_for([[maybe_unused]] const Product& product) {
#if PYQUANT_X86
  if (isa() >= Isa::kAmx && all_bfloat16(product)) return kEngineAmx;
  if (isa() >= Isa::kAvx512) return kEngineAvx512;
  if (isa() >= Isa::kAvx2) return kEngineAvx2;
#endif
  return kEnginePortable;
}

// How the output is cut into tasks. It decides speed and memory only: no sum crosses a task.
struct Cut {
  int64_t rows;
  int64_t columns;
};

// The accumulators of a task, and the panel of B that they meet, stay in the second-level cache.
constexpr int64_t kMaxTaskRows = 1024;
constexpr int64_t kMaxTaskColumns = 256;

// The largest task that still keeps every thread busy. Decoding is repeated for every cut of the rows and packing A for
// every cut of the columns; their price in columns (rows) of products is what the two constants estimate.
Cut choose_cut(const Engine& engine, int64_t rows, int64_t columns) {
  constexpr double kPackingPrice = 16, kDecodingPrice = 24;
  const int64_t threads = num_threads();
  Cut best{};
  double best_cost = 0;
  for (int64_t row_cuts = divide_up(rows, kMaxTaskRows);; row_cuts *= 2) {
    const int64_t task_rows = round_up(divide_up(rows, row_cuts), engine.tile_rows);
    const int64_t row_tasks = divide_up(rows, task_rows);
    for (int64_t task_columns = engine.tile_columns; task_columns <= kMaxTaskColumns;
         task_columns += engine.tile_columns) {
      const int64_t tasks = row_tasks * divide_up(columns, task_columns);
      const double area = (std::min(rows, task_rows) + kDecodingPrice) *
                          (std::min(task_columns, round_up(columns, engine.tile_columns)) + kPackingPrice);
      const double cost = static_cast<double>(divide_up(tasks, threads)) * area;
      if (best.rows == 0 || cost < best_cost) {
        best = {task_rows, task_columns};
        best_cost = cost;
      }
    }
    if (task_rows <= 4 * engine.tile_rows || row_tasks >= 4 * threads) return best;
  }
}

class Multiplication {
 public:
  explicit Multiplication(const Product& product)
      : product_(product), engine_(engine_for(product)), cut_(choose_cut(engine_, product.rows, product.columns)) {}

  void run() const {
    const int64_t column_tasks = divide_up(product_.columns, cut_.columns);
    const int64_t tasks = divide_up(product_.rows, cut_.rows) * column_tasks;
    parallel_for(tasks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t row = task / column_tasks * cut_.rows, column = task % column_tasks * cut_.columns;
        compute(row, std::min(cut_.rows, product_.rows - row), column,
                std::min(cut_.columns, product_.columns - column));
      }
    });
  }

 private:
  void compute(int64_t row, int64_t rows, int64_t column, int64_t columns) const {
    const int64_t stride = round_up(columns, engine_.tile_columns);
    float* c = static_cast<float*>(scratch(kSlotC, round_up(rows, engine_.tile_rows) * stride * sizeof(float)));
    bool accumulate = false;
    for (const Term& term : product_.terms) {
      for (int64_t start = 0; start < term.depth; start += engine_.depth_limit) {
        add(term, row, rows, column, columns, start, std::min(engine_.depth_limit, term.depth - start), c, stride,
            accumulate);
        accumulate = true;
      }
      if (&term == product_.terms && accumulate && product_.first_term_dropout != nullptr) {
        for (int64_t i = 0; i < rows; ++i) {
          engine_.drop(*product_.first_term_dropout, (row + i) * product_.columns + column, columns, c + i * stride);
        }
      }
    }
    if (!accumulate) std::fill_n(c, rows * stride, 0.0f);  // a reduction over nothing
    if (product_.output_transposed) return store_transposed(c, stride, row, rows, column, columns);
    for (int64_t i = 0; i < rows; ++i) {
      engine_.finish(c + i * stride, columns, product_.scale, product_.dtype, product_.bias, column, product_.output,
                     (row + i) * product_.columns + column);
    }
  }

  void add(const Term& term, int64_t row, int64_t rows, int64_t column, int64_t columns, int64_t start, int64_t depth,
           float* c, int64_t stride, bool accumulate) const {
    const int64_t panel_depth = engine_.depth_limit * engine_.element;
    void* b = scratch(kSlotB, round_up(columns, engine_.tile_columns) * panel_depth);
    void* a = scratch(kSlotA, engine_.panel_rows * panel_depth);
    if (term.weight == nullptr) {
      engine_.pack_b(term.b, column, columns, start, depth, b);
    } else if (term.weight_by_rows) {
      engine_.pack_weight_by_rows(*term.weight, column, columns, start, depth, b);
    } else {
      engine_.pack_weight(*term.weight, column, columns, start, depth, b);
    }
    int64_t done = 0;
    if (engine_.multiply_stored != nullptr) {
      done = engine_.multiply_stored(term.a, row, rows, start, b, columns, depth, c, stride, accumulate);
    }
    for (; done < rows; done += engine_.panel_rows) {
      const int64_t n = std::min(engine_.panel_rows, rows - done);
      engine_.pack_a(term.a, row + done, n, start, depth, a);
      engine_.multiply(a, b, n, columns, depth, c + done * stride, stride, accumulate);
    }
  }

  // Only gradients of adapters are stored so: float32, without a bias.
  void store_transposed(const float* c, int64_t stride, int64_t row, int64_t rows, int64_t column,
                        int64_t columns) const {
    float* to = static_cast<float*>(product_.output);
    for (int64_t j = 0; j < columns; ++j) {
      for (int64_t i = 0; i < rows; ++i) {
        to[(column + j) * product_.rows + row + i] = product_.scale * c[i * stride + j];
      }
    }
  }

  const Product& product_;
  const Engine& engine_;
  const Cut cut_;
};

}  // namespace

void multiply(const Product& product) {
  if (product.rows <= 0 || product.columns <= 0) return;
  Multiplication(product).run();
}

}  // namespace pyquant::cpu
