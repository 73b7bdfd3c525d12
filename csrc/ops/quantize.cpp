// pyquant::quantize_4bit
#include "ops/backend.h"

namespace pyquant::ops {
namespace {

constexpr const char* kOp = "quantize_4bit";

// torch's own mean, because the offset's bits are part of the format and bitsandbytes takes it from there: the order of
// a float32 sum is torch's, on either backend.
Tensor mean(const Tensor& absmax) {
  std::array<StableIValue, 2> stack{torch::stable::detail::from(absmax), torch::stable::detail::from(std::nullopt)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mean", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

void check_finite(const Tensor& absmax, int64_t blocksize, int64_t numel) {
  const float* begin = data<float>(absmax);
  for (int64_t block = 0; block < absmax.numel(); ++block) {
    PYQUANT_CHECK(std::isfinite(begin[block]), kOp, ": input holds NaN or infinity, between elements ",
                  block * blocksize, " and ", std::min(numel, (block + 1) * blocksize) - 1,
                  " of the flattened tensor; only finite values can be quantized");
  }
}

template <typename Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor> quantize_4bit(Tensor input, std::string quant_type, int64_t blocksize,
                                                         std::optional<Tensor> nested_code) {
  const DType dtype = dtype_of(input, kOp, "input");
  const QuantType type = quant_type_of(quant_type, kOp);
  check_blocksize(blocksize, kOp);
  const int64_t numel = input.numel();
  PYQUANT_CHECK(numel > 0, kOp, ": input has no elements");
  const int64_t blocks = (numel + blocksize - 1) / blocksize;

  std::optional<Tensor> code;
  if (nested_code.has_value()) {
    check_device(*nested_code, input, kOp, "nested_code", "input");
    PYQUANT_CHECK(nested_code->scalar_type() == ScalarType::Float && nested_code->numel() == 256, kOp,
                  ": nested_code must be float32 with 256 values");
    code = as_contiguous(*nested_code);
  }

  // The first launch comes as early as it can, and the rest of the host's work while it runs.
  const Backend backend(input);
  const Tensor values = as_contiguous(input);
  Tensor packed = new_empty(values, {(numel + 1) / 2, 1}, ScalarType::Byte);
  Tensor absmax = new_empty(values, {blocks}, ScalarType::Float);
  backend.quantize_4bit(dtype, values, type, blocksize, packed, absmax);
  // On a GPU this look would stall the stream; the layers look once for a whole weight instead.
  if constexpr (!Backend::kAsync) check_finite(absmax, blocksize, numel);
  if (!code.has_value()) {
    return {packed, absmax, new_empty(values, {0}, ScalarType::Float), new_empty(values, {0}, ScalarType::Float)};
  }

  const Tensor offset = mean(absmax);
  Tensor codes = new_empty(values, {blocks}, ScalarType::Byte);
  Tensor nested_absmax = new_empty(values, {(blocks + kNestedBlocksize - 1) / kNestedBlocksize}, ScalarType::Float);
  backend.quantize_absmax(absmax, offset, *code, codes, nested_absmax);
  return {packed, codes, nested_absmax, offset};
}

}  // namespace
}  // namespace pyquant::ops

STABLE_TORCH_LIBRARY_FRAGMENT(pyquant, library) {
  library.def(
      "quantize_4bit(Tensor input, str quant_type, int blocksize, Tensor? nested_code=None) -> "
      "(Tensor packed, Tensor absmax, Tensor nested_absmax, Tensor offset)");
}
PYQUANT_IMPL("quantize_4bit", quantize_4bit)
