// The adapter's own products. Their short side, the rank, is always a dimension of the output or of the reduction, so
// the long operand is read once.
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/kernels.h"

namespace pyquant::cpu {

void lora_down(DType dtype, int64_t m, int64_t k, int64_t rank, const void* x, const void* a, float scaling,
               const Dropout& dropout, void* xa) {
  Product product;
  product.rows = m;
  product.columns = rank;
  product.dtype = dtype;
  product.output = xa;
  product.scale = dropout.active() ? scaling * dropout.scale : scaling;
  Term& term = product.terms[0];
  term.depth = k;
  term.a = {x, dtype, k, /*transposed=*/false, dropout.active() ? &dropout : nullptr};
  term.b = {a, dtype, k, /*transposed=*/true};
  multiply(product);
}

void lora_dya(DType dtype, int64_t m, int64_t n, int64_t rank, const void* dy, const void* b, float scaling,
              void* dya) {
  Product product;
  product.rows = m;
  product.columns = rank;
  product.dtype = dtype;
  product.output = dya;
  product.scale = scaling;
  Term& term = product.terms[0];
  term.depth = n;
  term.a = {dy, dtype, n};
  term.b = {b, dtype, rank};
  multiply(product);
}

void lora_grad_a(DType dtype, int64_t m, int64_t k, int64_t rank, const void* dya, const void* x,
                 const Dropout& dropout, float* da) {
  Product product;
  product.rows = rank;
  product.columns = k;
  product.output = da;
  product.scale = dropout.active() ? dropout.scale : 1.0f;
  Term& term = product.terms[0];
  term.depth = m;
  term.a = {dya, dtype, rank, /*transposed=*/true};
  term.b = {x, dtype, k, /*transposed=*/false, dropout.active() ? &dropout : nullptr};
  multiply(product);
}

void lora_grad_b(DType dtype, int64_t m, int64_t n, int64_t rank, const void* dy, const void* xa, float* db) {
  // As xaᵀ · dy, stored transposed: so the long operand dy is read along its rows.
  Product product;
  product.rows = rank;
  product.columns = n;
  product.output = db;
  product.output_transposed = true;
  Term& term = product.terms[0];
  term.depth = m;
  term.a = {xa, dtype, rank, /*transposed=*/true};
  term.b = {dy, dtype, n};
  multiply(product);
}

}  // namespace pyquant::cpu
