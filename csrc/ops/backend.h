// The two backends behind one set of names, so that an op is written once and registered for both: an op checks its
// arguments, allocates its outputs and calls `Backend(tensor).kernel(...)`.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <type_traits>

#include "kernels/cpu/kernels.h"
#include "ops/common.h"

#if PYQUANT_CUDA
#include "kernels/cuda/kernels.h"
// Lives in libtorch_cuda. Weak, so that a library with CUDA kernels also loads beside a CPU-only torch, where no CUDA
// tensor can reach the ops.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);
#endif

namespace pyquant::ops {

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

// left[m, rank] · factor, see kernels.h, with a factor of any dtype. No adapter: rank 0.
struct LowRankTerm {
  const Tensor* left = nullptr;
  const Tensor* factor = nullptr;
  int64_t rank = 0;
  bool left_beside = false;  // kernels/cuda/kernels.h
};

// A factor as the kernels that take the activations' dtype want it.
inline Tensor in_dtype(const Tensor& factor, DType dtype) {
  const ScalarType type = scalar_type_of(dtype);
  return factor.scalar_type() == type ? factor : as_contiguous(torch::stable::to(factor, type));
}

class Cpu {
 public:
  static constexpr bool kAsync = false;

  explicit Cpu(const Tensor&) {}

  void quantize_4bit(DType dtype, const Tensor& input, QuantType type, int64_t blocksize, Tensor& packed,
                     Tensor& absmax) const {
    cpu::quantize_4bit(dtype, input.data_ptr(), input.numel(), type, blocksize, data<uint8_t>(packed),
                       data<float>(absmax));
  }
  void quantize_absmax(const Tensor& absmax, const Tensor& offset, const Tensor& code, Tensor& codes,
                       Tensor& nested_absmax) const {
    cpu::quantize_absmax(data<float>(absmax), absmax.numel(), data<float>(offset), data<float>(code),
                         data<uint8_t>(codes), data<float>(nested_absmax));
  }
  void dequantize_4bit(const QuantizedMatrix& weight, DType dtype, Tensor& output) const {
    cpu::dequantize_4bit(weight, dtype, output.data_ptr());
  }
  void linear_4bit(const QuantizedMatrix& weight, const Activation& x, const void* bias, const LowRankTerm& lora,
                   Tensor& y) const {
    const Factor factor(lora, x.dtype);
    cpu::linear_4bit(weight, x.dtype, x.rows, x.data(), bias, factor.low_rank, y.data_ptr());
  }
  void linear_4bit_dx(const QuantizedMatrix& weight, const Activation& dy, const LowRankTerm& lora,
                      const Dropout& dropout, Tensor& dx) const {
    const Factor factor(lora, dy.dtype);
    cpu::linear_4bit_dx(weight, dy.dtype, dy.rows, dy.data(), factor.low_rank, dropout, dx.data_ptr());
  }
  void lora_down(const QuantizedMatrix& weight, const Activation& x, int64_t rank, const Tensor& a, float scaling,
                 const Dropout& dropout, Tensor& xa) const {
    const Tensor factor = in_dtype(a, x.dtype);
    cpu::lora_down(x.dtype, x.rows, weight.k, rank, x.data(), factor.data_ptr(), scaling, dropout, xa.data_ptr());
  }
  void lora_dya(const QuantizedMatrix& weight, const Activation& dy, int64_t rank, const Tensor& b, float scaling, bool,
                Tensor& dya) const {
    const Tensor factor = in_dtype(b, dy.dtype);
    cpu::lora_dya(dy.dtype, dy.rows, weight.n, rank, dy.data(), factor.data_ptr(), scaling, dya.data_ptr());
  }
  void lora_grad_a(const Activation& x, int64_t k, int64_t rank, const Tensor& dya, const Dropout& dropout,
                   Tensor& da) const {
    cpu::lora_grad_a(x.dtype, x.rows, k, rank, dya.data_ptr(), x.data(), dropout, data<float>(da));
  }
  void lora_grad_b(const Activation& dy, int64_t n, int64_t rank, const Tensor& xa, Tensor& db) const {
    cpu::lora_grad_b(dy.dtype, dy.rows, n, rank, dy.data(), xa.data_ptr(), data<float>(db));
  }

 private:
  // The low-rank term of the kernels, and the tensor that its factor may have been cast to.
  struct Factor {
    std::optional<Tensor> cast;
    cpu::LowRank low_rank{};
    Factor(const LowRankTerm& lora, DType dtype) {
      if (lora.rank == 0) return;
      cast = in_dtype(*lora.factor, dtype);
      low_rank = {lora.left->data_ptr(), cast->data_ptr(), lora.rank};
    }
  };
};

#if PYQUANT_CUDA
// Makes the tensor's device current for the launches of one op, on that device's current stream.
class Cuda {
 public:
  static constexpr bool kAsync = true;

  explicit Cuda(const Tensor& tensor) : guard_(checked_index(tensor)) {
    PYQUANT_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                  "pyquant: a CUDA tensor, but this torch has no CUDA library");
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  void quantize_4bit(DType dtype, const Tensor& input, QuantType type, int64_t blocksize, Tensor& packed,
                     Tensor& absmax) const {
    cuda::quantize_4bit(dtype, input.data_ptr(), input.numel(), type, blocksize, data<uint8_t>(packed),
                        data<float>(absmax), stream_);
  }
  void quantize_absmax(const Tensor& absmax, const Tensor& offset, const Tensor& code, Tensor& codes,
                       Tensor& nested_absmax) const {
    cuda::quantize_absmax(data<float>(absmax), absmax.numel(), data<float>(offset), data<float>(code),
                          data<uint8_t>(codes), data<float>(nested_absmax), stream_);
  }
  void dequantize_4bit(const QuantizedMatrix& weight, DType dtype, Tensor& output) const {
    cuda::dequantize_4bit(weight, dtype, output.data_ptr(), stream_);
  }
  void linear_4bit(const QuantizedMatrix& weight, const Activation& x, const void* bias, const LowRankTerm& lora,
                   Tensor& y) const {
    const Factor factor(lora, x.dtype, [&](const cuda::LowRank& low_rank) {
      return cuda::linear_4bit_reads_float(weight, x.dtype, x.rows, x.data(), low_rank);
    });
    const Workspace scratch(y, cuda::linear_4bit_workspace(weight, x.dtype, x.rows, factor.low_rank));
    cuda::linear_4bit(weight, x.dtype, x.rows, x.data(), bias, factor.low_rank, y.data_ptr(), scratch.data, stream_);
  }
  void linear_4bit_dx(const QuantizedMatrix& weight, const Activation& dy, const LowRankTerm& lora,
                      const Dropout& dropout, Tensor& dx) const {
    const Factor factor(lora, dy.dtype, [&](const cuda::LowRank& low_rank) {
      return cuda::linear_4bit_dx_reads_float(weight, dy.dtype, dy.rows, dy.data(), low_rank);
    });
    const Workspace scratch(dx, cuda::linear_4bit_dx_workspace(weight, dy.dtype, dy.rows, factor.low_rank));
    cuda::linear_4bit_dx(weight, dy.dtype, dy.rows, dy.data(), factor.low_rank, dropout, dx.data_ptr(), scratch.data,
                         stream_);
  }
  void lora_down(const QuantizedMatrix& weight, const Activation& x, int64_t rank, const Tensor& a, float scaling,
                 const Dropout& dropout, Tensor& xa) const {
    const bool as_float = in_float(a, x.dtype) &&
                          cuda::lora_down_reads_float(weight, x.dtype, x.rows, rank, x.data(), a.data_ptr(), dropout);
    const Tensor factor = as_float ? a : in_dtype(a, x.dtype);
    cuda::lora_down(weight, x.dtype, x.rows, rank, x.data(), factor.data_ptr(), as_float, scaling, dropout,
                    xa.data_ptr(), stream_);
  }
  void lora_dya(const QuantizedMatrix& weight, const Activation& dy, int64_t rank, const Tensor& b, float scaling,
                bool beside, Tensor& dya) const {
    const bool as_float =
        in_float(b, dy.dtype) && cuda::lora_dya_reads_float(weight, dy.dtype, dy.rows, rank, dy.data(), b.data_ptr());
    const Tensor factor = as_float ? b : in_dtype(b, dy.dtype);
    cuda::lora_dya(weight, dy.dtype, dy.rows, rank, dy.data(), factor.data_ptr(), as_float, scaling, beside,
                   dya.data_ptr(), stream_);
  }
  void lora_grad_a(const Activation& x, int64_t k, int64_t rank, const Tensor& dya, const Dropout& dropout,
                   Tensor& da) const {
    const Workspace scratch(da, cuda::lora_grad_workspace(x.dtype, x.rows, k, rank));
    cuda::lora_grad_a(x.dtype, x.rows, k, rank, dya.data_ptr(), x.data(), dropout, data<float>(da), scratch.data,
                      stream_);
  }
  void lora_grad_b(const Activation& dy, int64_t n, int64_t rank, const Tensor& xa, Tensor& db) const {
    const Workspace scratch(db, cuda::lora_grad_workspace(dy.dtype, dy.rows, n, rank));
    cuda::lora_grad_b(dy.dtype, dy.rows, n, rank, dy.data(), xa.data_ptr(), data<float>(db), scratch.data, stream_);
  }

 private:
  // One CUDA tensor among the arguments is enough for the dispatcher to come here.
  static int32_t checked_index(const Tensor& tensor) {
    PYQUANT_CHECK(
        tensor.is_cuda(),
        "pyquant: the input and other tensors are on different devices (cpu and cuda); move one with .to(device)");
    return tensor.get_device_index();
  }

  // float32 beside 16-bit activations.
  static bool in_float(const Tensor& factor, DType dtype) {
    return dtype != DType::kFloat32 && factor.scalar_type() == ScalarType::Float;
  }

  // The low-rank term of the kernels, and the tensor that its factor was cast to, unless they read it as it is.
  struct Factor {
    std::optional<Tensor> cast;
    cuda::LowRank low_rank{};
    template <typename ReadsFloat>
    Factor(const LowRankTerm& lora, DType dtype, const ReadsFloat& reads_float) {
      if (lora.rank == 0) return;
      low_rank = {lora.left->data_ptr(), lora.factor->data_ptr(), lora.rank, lora.left_beside,
                  in_float(*lora.factor, dtype)};
      if (low_rank.float_factor && reads_float(low_rank)) return;
      cast = in_dtype(*lora.factor, dtype);
      low_rank.factor = cast->data_ptr(), low_rank.float_factor = false;
    }
  };

  // Scratch memory from torch's caching allocator: freed when the op returns, reused only by later work on the stream.
  struct Workspace {
    std::optional<Tensor> tensor;
    void* data = nullptr;
    Workspace(const Tensor& reference, int64_t bytes) {
      if (bytes == 0) return;
      tensor = torch::stable::new_empty(reference, {bytes}, ScalarType::Byte);
      data = tensor->data_ptr();
    }
  };

  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};
#else
// Registered all the same, so that a CUDA tensor gets a sentence instead of the dispatcher's table of backends.
class Cuda : public Cpu {
 public:
  explicit Cuda(const Tensor& tensor) : Cpu(tensor) {
    fail(
        "pyquant was built without CUDA and got a CUDA tensor. Install it again where nvcc is on PATH or "
        "CUDA_HOME is set; pyquant.show_config() says what was built");
  }
};
#endif

}  // namespace pyquant::ops

// Registers `function<Backend>` as the implementation of an op on both backends.
#define PYQUANT_IMPL(name, function)                                            \
  STABLE_TORCH_LIBRARY_IMPL(pyquant, CPU, library) {                            \
    library.impl(name, TORCH_BOX(&pyquant::ops::function<pyquant::ops::Cpu>));  \
  }                                                                             \
  STABLE_TORCH_LIBRARY_IMPL(pyquant, CUDA, library) {                           \
    library.impl(name, TORCH_BOX(&pyquant::ops::function<pyquant::ops::Cuda>)); \
  }
