#include "kernels/cpu/gemm.h"
#include "kernels/cpu/gemv.h"
#include "kernels/cpu/kernels.h"

namespace pyquant::cpu {

void linear_4bit(const QuantizedMatrix& weight, DType dtype, int64_t m, const void* x, const void* bias,
                 const LowRank& lora, void* y) {
  if (m <= 0 || weight.n <= 0) return;
  if (multiply_few_rows(weight, dtype, m, x, bias, lora, y)) return;
  Product product;
  product.rows = m;
  product.columns = weight.n;
  product.dtype = dtype;
  product.output = y;
  product.bias = bias;
  Term& base = product.terms[0];
  base.depth = weight.k;
  base.a = {x, dtype, weight.k};
  base.weight = &weight;
  Term& adapter = product.terms[1];
  adapter.depth = lora.rank;
  adapter.a = {lora.left, dtype, lora.rank};
  adapter.b = {lora.factor, dtype, lora.rank, /*transposed=*/true};
  multiply(product);
}

void linear_4bit_dx(const QuantizedMatrix& weight, DType dtype, int64_t m, const void* dy, const LowRank& lora,
                    const Dropout& dropout, void* dx) {
  Product product;
  product.rows = m;
  product.columns = weight.k;
  product.dtype = dtype;
  product.output = dx;
  // The adapter's term comes first, so that dropout meets it alone.
  Term& adapter = product.terms[0];
  adapter.depth = lora.rank;
  adapter.a = {lora.left, dtype, lora.rank};
  adapter.b = {lora.factor, dtype, weight.k};
  if (dropout.active()) product.first_term_dropout = &dropout;
  Term& base = product.terms[1];
  base.depth = weight.n;
  base.a = {dy, dtype, weight.n};
  base.weight = &weight;
  base.weight_by_rows = true;
  multiply(product);
}

}  // namespace pyquant::cpu
