// pyquant::linear_4bit (y = x·Wᵀ + bias) and pyquant::linear_4bit_dx (dx = dy·W)
#include "ops/backend.h"

namespace pyquant::ops {
namespace {

template <typename Backend>
Tensor linear_4bit(Tensor x, Tensor packed, Tensor absmax, std::optional<Tensor> nested_absmax,
                   std::optional<Tensor> nested_code, std::optional<Tensor> offset, std::string quant_type,
                   int64_t blocksize, int64_t n, int64_t k, std::optional<Tensor> bias) {
  constexpr const char* kOp = "linear_4bit";
  const Backend backend(x);
  const Activation input = check_activation(kOp, x, "x", k, "input features");
  const Weight weight =
      check_weight(kOp, x, "x", packed, absmax, nested_absmax, nested_code, offset, quant_type, blocksize, n, k);
  const std::optional<Tensor> bias_values = check_bias(kOp, bias, input, n);
  Tensor y = new_like(input, n);
  if (input.rows > 0) {
    backend.linear_4bit(weight.view, input, bias_values ? bias_values->data_ptr() : nullptr, {}, y);
  }
  return y;
}

template <typename Backend>
Tensor linear_4bit_dx(Tensor dy, Tensor packed, Tensor absmax, std::optional<Tensor> nested_absmax,
                      std::optional<Tensor> nested_code, std::optional<Tensor> offset, std::string quant_type,
                      int64_t blocksize, int64_t n, int64_t k) {
  constexpr const char* kOp = "linear_4bit_dx";
  const Backend backend(dy);
  const Activation input = check_activation(kOp, dy, "dy", n, "output features");
  const Weight weight =
      check_weight(kOp, dy, "dy", packed, absmax, nested_absmax, nested_code, offset, quant_type, blocksize, n, k);
  Tensor dx = new_like(input, k);
  if (input.rows > 0) backend.linear_4bit_dx(weight.view, input, {}, {}, dx);
  return dx;
}

}  // namespace
}  // namespace pyquant::ops

STABLE_TORCH_LIBRARY_FRAGMENT(pyquant, library) {
  library.def(
      "linear_4bit(Tensor x, Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_code, Tensor? offset, "
      "str quant_type, int blocksize, SymInt n, SymInt k, Tensor? bias) -> Tensor");
  library.def(
      "linear_4bit_dx(Tensor dy, Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_code, "
      "Tensor? offset, str quant_type, int blocksize, SymInt n, SymInt k) -> Tensor");
}
PYQUANT_IMPL("linear_4bit", linear_4bit)
PYQUANT_IMPL("linear_4bit_dx", linear_4bit_dx)
