// pyquant::dequantize_4bit
#include "ops/backend.h"

namespace pyquant::ops {
namespace {

constexpr const char* kOp = "dequantize_4bit";

template <typename Backend>
Tensor dequantize_4bit(Tensor packed, Tensor absmax, std::optional<Tensor> nested_absmax,
                       std::optional<Tensor> nested_code, std::optional<Tensor> offset, std::string quant_type,
                       int64_t blocksize, std::vector<int64_t> shape, ScalarType scalar_type) {
  // A tensor of any shape is a matrix of its last dimension; the blocks run over the flattened order either way.
  int64_t rows = 1;
  for (size_t i = 0; i + 1 < shape.size(); ++i) rows *= shape[i];
  const int64_t columns = shape.empty() ? 1 : shape.back();
  const Backend backend(packed);
  const Weight weight = check_weight(kOp, packed, "the packed weight", packed, absmax, nested_absmax, nested_code,
                                     offset, quant_type, blocksize, rows, columns);
  Tensor output = torch::stable::new_empty(packed, shape, scalar_type);
  backend.dequantize_4bit(weight.view, dtype_of(output, kOp, "dtype"), output);
  return output;
}

}  // namespace
}  // namespace pyquant::ops

STABLE_TORCH_LIBRARY_FRAGMENT(pyquant, library) {
  library.def(
      "dequantize_4bit(Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_code, Tensor? offset, "
      "str quant_type, int blocksize, SymInt[] shape, ScalarType dtype) -> Tensor");
}
PYQUANT_IMPL("dequantize_4bit", dequantize_4bit)
