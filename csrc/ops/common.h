// What the op files share: argument checks with messages for the caller, and the borrowed views that kernels take.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <cmath>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "format/philox.h"
#include "format/quantized_matrix.h"

namespace pyquant::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Throws what Python sees as a RuntimeError with the parts as its message; torch's own macro would put the source
// file's path in front.
template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

#define PYQUANT_CHECK(condition, ...) \
  if (!(condition)) ::pyquant::ops::fail(__VA_ARGS__)

inline DType dtype_of(const Tensor& tensor, const char* op, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      fail(op, ": ", name, " must be float32, float16 or bfloat16, got ",
           torch::headeronly::toString(tensor.scalar_type()));
  }
}

inline ScalarType scalar_type_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return ScalarType::Float;
    case DType::kFloat16:
      return ScalarType::Half;
    default:
      return ScalarType::BFloat16;
  }
}

inline QuantType quant_type_of(const std::string& name, const char* op) {
  if (name == "nf4") return QuantType::kNF4;
  PYQUANT_CHECK(name == "fp4", op, ": quant_type must be 'nf4' or 'fp4', got '", name, "'");
  return QuantType::kFP4;
}

inline void check_blocksize(int64_t blocksize, const char* op) {
  PYQUANT_CHECK(blocksize >= 32 && blocksize <= 4096 && (blocksize & (blocksize - 1)) == 0, op,
                ": blocksize must be a power of two from 32 to 4096, got ", blocksize);
}

inline void check_device(const Tensor& tensor, const Tensor& reference, const char* op, const char* name,
                         const char* reference_name) {
  PYQUANT_CHECK(tensor.is_cuda() == reference.is_cuda() && tensor.get_device_index() == reference.get_device_index(),
                op, ": ", name, " and ", reference_name, " are on different devices (",
                tensor.is_cuda() ? "cuda" : "cpu", " and ", reference.is_cuda() ? "cuda" : "cpu",
                "); move one with .to(device)");
}

inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// A contiguous tensor beside `reference`, contents arbitrary. torch::stable::new_empty does the same through a boxed
// call by name, which takes several times as long.
template <size_t kDims>
Tensor new_empty(const Tensor& reference, const int64_t (&sizes)[kDims], ScalarType type) {
  int64_t strides[kDims];
  int64_t stride = 1;
  for (size_t i = kDims; i-- > 0;) {
    strides[i] = stride;
    stride *= sizes[i];
  }
  int32_t device_type = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(reference.get(), &device_type));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      kDims, sizes, strides, torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)), device_type,
      reference.get_device_index(), &handle));
  return Tensor(handle);
}

inline std::vector<int64_t> sizes_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return std::vector<int64_t>(sizes.begin(), sizes.end());
}

// A 4-bit weight as the ops take it: the tensors that own the bytes, and the view a kernel reads.
struct Weight {
  Tensor packed, absmax;
  std::optional<Tensor> nested_absmax, nested_code, offset;
  QuantizedMatrix view;
};

inline Weight check_weight(const char* op, const Tensor& reference, const char* reference_name, const Tensor& packed,
                           const Tensor& absmax, const std::optional<Tensor>& nested_absmax,
                           const std::optional<Tensor>& nested_code, const std::optional<Tensor>& offset,
                           const std::string& quant_type, int64_t blocksize, int64_t n, int64_t k) {
  const QuantType type = quant_type_of(quant_type, op);
  check_blocksize(blocksize, op);
  PYQUANT_CHECK(n > 0 && k > 0, op, ": the weight's shape must be positive, got [", n, ", ", k, "]");

  check_device(packed, reference, op, "the packed weight", reference_name);
  check_device(absmax, reference, op, "absmax", reference_name);
  Weight weight{as_contiguous(packed), as_contiguous(absmax), nested_absmax, nested_code, offset, {}};
  QuantizedMatrix& view = weight.view;
  view.n = n;
  view.k = k;
  view.type = type;
  view.blocksize = blocksize;

  const int64_t bytes = packed.numel() * static_cast<int64_t>(packed.element_size());
  PYQUANT_CHECK(bytes == (view.numel() + 1) / 2, op, ": a [", n, ", ", k, "] weight packs into ",
                (view.numel() + 1) / 2, " bytes, the packed weight has ", bytes);
  PYQUANT_CHECK(absmax.numel() == view.blocks(), op, ": a [", n, ", ", k, "] weight in blocks of ", blocksize, " has ",
                view.blocks(), " absmax values, got ", absmax.numel());
  view.packed = static_cast<const uint8_t*>(weight.packed.data_ptr());

  if (!nested_absmax.has_value()) {
    PYQUANT_CHECK(absmax.scalar_type() == ScalarType::Float, op,
                  ": absmax must be float32 without double quantization (give nested_absmax, nested_code and offset "
                  "for 8-bit absmax), got ",
                  torch::headeronly::toString(absmax.scalar_type()));
    view.absmax = static_cast<const float*>(weight.absmax.data_ptr());
    return weight;
  }

  PYQUANT_CHECK(nested_code.has_value() && offset.has_value(), op,
                ": double quantization needs nested_absmax, nested_code and offset together");
  PYQUANT_CHECK(absmax.scalar_type() == ScalarType::Byte, op, ": absmax must be uint8 with double quantization, got ",
                torch::headeronly::toString(absmax.scalar_type()));
  const auto statistic = [&](std::optional<Tensor>& tensor, const char* name, int64_t length) {
    check_device(*tensor, reference, op, name, reference_name);
    PYQUANT_CHECK(tensor->scalar_type() == ScalarType::Float && tensor->numel() == length, op, ": ", name,
                  " must be float32 with ", length, " values, got ", torch::headeronly::toString(tensor->scalar_type()),
                  " with ", tensor->numel());
    tensor = as_contiguous(*tensor);
    return static_cast<const float*>(tensor->data_ptr());
  };
  view.absmax_codes = static_cast<const uint8_t*>(weight.absmax.data_ptr());
  view.nested_absmax =
      statistic(weight.nested_absmax, "nested_absmax", (view.blocks() + kNestedBlocksize - 1) / kNestedBlocksize);
  view.nested_code = statistic(weight.nested_code, "nested_code", 256);
  view.offset = statistic(weight.offset, "offset", 1);
  return weight;
}

// An activation [..., columns] as a contiguous matrix.
struct Activation {
  Tensor tensor;
  DType dtype;
  int64_t rows;
  std::vector<int64_t> sizes;

  const void* data() const { return tensor.data_ptr(); }
};

inline Activation check_activation(const char* op, const Tensor& tensor, const char* name, int64_t columns,
                                   const char* columns_name) {
  const DType dtype = dtype_of(tensor, op, name);
  PYQUANT_CHECK(tensor.dim() >= 1, op, ": ", name, " must have at least one dimension");
  std::vector<int64_t> sizes = sizes_of(tensor);
  PYQUANT_CHECK(sizes.back() == columns, op, ": the last dimension of ", name, " must be the weight's ", columns_name,
                " = ", columns, ", got ", sizes.back());
  int64_t rows = 1;
  for (size_t i = 0; i + 1 < sizes.size(); ++i) rows *= sizes[i];
  return {as_contiguous(tensor), dtype, rows, std::move(sizes)};
}

inline Tensor new_like(const Activation& activation, int64_t columns) {
  std::vector<int64_t> sizes = activation.sizes;
  sizes.back() = columns;
  return torch::stable::new_empty(activation.tensor, sizes);
}

inline std::optional<Tensor> check_bias(const char* op, const std::optional<Tensor>& bias, const Activation& x,
                                        int64_t n) {
  if (!bias.has_value()) return std::nullopt;
  check_device(*bias, x.tensor, op, "bias", "x");
  PYQUANT_CHECK(bias->scalar_type() == x.tensor.scalar_type() && bias->numel() == n, op, ": bias must have ", n,
                " values of the dtype of x (", torch::headeronly::toString(x.tensor.scalar_type()), "), got ",
                bias->numel(), " of ", torch::headeronly::toString(bias->scalar_type()));
  return as_contiguous(*bias);
}

inline Dropout check_dropout(const char* op, double p, const std::optional<Tensor>& seed, const Tensor& reference) {
  if (p == 0.0) return Dropout{nullptr, 0, 1.0f};
  PYQUANT_CHECK(p > 0.0 && p < 1.0, op, ": dropout must be at least 0 and less than 1, got ", p);
  PYQUANT_CHECK(seed.has_value() && seed->scalar_type() == ScalarType::Long && seed->numel() == 1, op,
                ": dropout needs seed, an int64 tensor with one element");
  check_device(*seed, reference, op, "seed", "the input");
  return Dropout{static_cast<const int64_t*>(seed->data_ptr()), static_cast<uint32_t>(std::llround(p * 4294967296.0)),
                 static_cast<float>(1.0 / (1.0 - p))};
}

}  // namespace pyquant::ops
