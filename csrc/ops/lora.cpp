// pyquant::lora_linear_4bit and its backward: the 4-bit linear with its LoRA adapter (Hu et al., 2021).
//
//   xa = scaling · dropout(x) · Aᵀ            y  = x · Wᵀ + xa · Bᵀ + bias
//   dya = scaling · dy · B                    dx = dy · W + dropout(dya · A),  dA = dyaᵀ · dropout(x),  dB = dyᵀ · xa
#include "ops/backend.h"

namespace pyquant::ops {
namespace {

Adapter check_adapter(const char* op, const Activation& x, const char* name, const Tensor& lora_a, const Tensor& lora_b,
                      int64_t n, int64_t k) {
  check_device(lora_a, x.tensor, op, "lora_A", name);
  check_device(lora_b, x.tensor, op, "lora_B", name);
  PYQUANT_CHECK(lora_a.dim() == 2 && lora_b.dim() == 2 && lora_a.size(0) == lora_b.size(1) && lora_a.size(0) > 0 &&
                    lora_a.size(1) == k && lora_b.size(0) == n,
                op, ": lora_A must be [r, ", k, "] and lora_B [", n, ", r] for one rank r > 0");
  dtype_of(lora_a, op, "lora_A");
  dtype_of(lora_b, op, "lora_B");
  return {as_contiguous(lora_a), as_contiguous(lora_b), lora_a.size(0)};
}

template <typename Backend>
std::tuple<Tensor, Tensor> lora_linear_4bit(Tensor x, Tensor packed, Tensor absmax, std::optional<Tensor> nested_absmax,
                                            std::optional<Tensor> nested_code, std::optional<Tensor> offset,
                                            std::string quant_type, int64_t blocksize, int64_t n, int64_t k,
                                            std::optional<Tensor> bias, Tensor lora_a, Tensor lora_b, double scaling,
                                            double dropout, std::optional<Tensor> seed) {
  constexpr const char* kOp = "lora_linear_4bit";
  const Backend backend(x);
  const Activation input = check_activation(kOp, x, "x", k, "input features");
  const Weight weight =
      check_weight(kOp, x, "x", packed, absmax, nested_absmax, nested_code, offset, quant_type, blocksize, n, k);
  const std::optional<Tensor> bias_values = check_bias(kOp, bias, input, n);
  const Adapter adapter = check_adapter(kOp, input, "x", lora_a, lora_b, n, k);
  const Dropout mask = check_dropout(kOp, dropout, seed, x);

  Tensor xa = torch::stable::new_empty(input.tensor, {input.rows, adapter.rank});
  Tensor y = new_like(input, n);
  if (input.rows > 0) {
    backend.lora_linear_4bit(weight.view, input, bias_values ? bias_values->data_ptr() : nullptr, adapter,
                             static_cast<float>(scaling), mask, xa, y);
  }
  return {y, xa};
}

template <typename Backend>
std::tuple<Tensor, Tensor, Tensor> lora_linear_4bit_backward(Tensor dy, Tensor x, Tensor xa, Tensor packed,
                                                             Tensor absmax, std::optional<Tensor> nested_absmax,
                                                             std::optional<Tensor> nested_code,
                                                             std::optional<Tensor> offset, std::string quant_type,
                                                             int64_t blocksize, int64_t n, int64_t k, Tensor lora_a,
                                                             Tensor lora_b, double scaling, double dropout,
                                                             std::optional<Tensor> seed, bool needs_dx) {
  constexpr const char* kOp = "lora_linear_4bit_backward";
  const Backend backend(x);
  const Activation gradient = check_activation(kOp, dy, "dy", n, "output features");
  const Activation input = check_activation(kOp, x, "x", k, "input features");
  PYQUANT_CHECK(input.dtype == gradient.dtype && input.rows == gradient.rows, kOp,
                ": dy and x must agree in dtype and in every dimension but the last");
  const Weight weight =
      check_weight(kOp, x, "x", packed, absmax, nested_absmax, nested_code, offset, quant_type, blocksize, n, k);
  const Adapter adapter = check_adapter(kOp, input, "x", lora_a, lora_b, n, k);
  const Dropout mask = check_dropout(kOp, dropout, seed, x);
  PYQUANT_CHECK(xa.scalar_type() == x.scalar_type() && xa.numel() == input.rows * adapter.rank, kOp,
                ": xa must be what lora_linear_4bit returned for x, [", input.rows, ", ", adapter.rank, "]");
  const Tensor xa_values = as_contiguous(xa);

  Tensor dx = needs_dx ? new_like(gradient, k) : torch::stable::new_empty(x, {0});
  if (input.rows == 0) {
    return {dx, torch::stable::new_zeros(x, {adapter.rank, k}, ScalarType::Float),
            torch::stable::new_zeros(x, {n, adapter.rank}, ScalarType::Float)};
  }
  Tensor da = torch::stable::new_empty(x, {adapter.rank, k}, ScalarType::Float);
  Tensor db = torch::stable::new_empty(x, {n, adapter.rank}, ScalarType::Float);
  Tensor dya = torch::stable::new_empty(input.tensor, {input.rows, adapter.rank});
  backend.lora_linear_4bit_dx(weight.view, gradient, adapter, static_cast<float>(scaling), mask, needs_dx, dya, dx);
  backend.lora_grad_a(input, k, adapter.rank, dya, mask, da);
  backend.lora_grad_b(gradient, n, adapter.rank, xa_values, db);
  return {dx, da, db};
}

}  // namespace
}  // namespace pyquant::ops

STABLE_TORCH_LIBRARY_FRAGMENT(pyquant, library) {
  library.def(
      "lora_linear_4bit(Tensor x, Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_code, "
      "Tensor? offset, str quant_type, int blocksize, SymInt n, SymInt k, Tensor? bias, Tensor lora_A, Tensor lora_B, "
      "float scaling, float dropout, Tensor? seed) -> (Tensor y, Tensor xa)");
  library.def(
      "lora_linear_4bit_backward(Tensor dy, Tensor x, Tensor xa, Tensor packed, Tensor absmax, Tensor? nested_absmax, "
      "Tensor? nested_code, Tensor? offset, str quant_type, int blocksize, SymInt n, SymInt k, Tensor lora_A, "
      "Tensor lora_B, float scaling, float dropout, Tensor? seed, bool needs_dx) -> "
      "(Tensor dx, Tensor dA, Tensor dB)");
}
PYQUANT_IMPL("lora_linear_4bit", lora_linear_4bit)
PYQUANT_IMPL("lora_linear_4bit_backward", lora_linear_4bit_backward)
