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

// left[m, rank] · factor, see kernels.h. No adapter: rank 0.
struct LowRankTerm {
  const void* left = nullptr;
  const void* factor = nullptr;
  int64_t rank = 0;
  bool left_beside = false;  // kernels/cuda/kernels.h
};

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
    cpu::linear_4bit(weight, x.dtype, x.rows, x.data(), bias, {lora.left, lora.factor, lora.rank}, y.data_ptr());
  }
  void linear_4bit_dx(const QuantizedMatrix& weight, const Activation& dy, const LowRankTerm& lora,
                      const Dropout& dropout, Tensor& dx) const {
    cpu::linear_4bit_dx(weight, dy.dtype, dy.rows, dy.data(), {lora.left, lora.factor, lora.rank}, dropout,
                        dx.data_ptr());
  }
  void lora_down(const QuantizedMatrix& weight, const Activation& x, int64_t rank, const Tensor& a, float scaling,
                 const Dropout& dropout, Tensor& xa) const {
    cpu::lora_down(x.dtype, x.rows, weight.k, rank, x.data(), a.data_ptr(), scaling, dropout, xa.data_ptr());
  }
  void lora_dya(const QuantizedMatrix& weight, const Activation& dy, int64_t rank, const Tensor& b, float scaling, bool,
                Tensor& dya) const {
    cpu::lora_dya(dy.dtype, dy.rows, weight.n, rank, dy.data(), b.data_ptr(), scaling, dya.data_ptr());
  }
  void lora_grad_a(const Activation& x, int64_t k, int64_t rank, const Tensor& dya, const Dropout& dropout,
                   Tensor& da) const {
    cpu::lora_grad_a(x.dtype, x.rows, k, rank, dya.data_ptr(), x.data(), dropout, data<float>(da));
  }
  void lora_grad_b(const Activation& dy, int64_t n, int64_t rank, const Tensor& xa, Tensor& db) const {
    cpu::lora_grad_b(dy.dtype, dy.rows, n, rank, dy.data(), xa.data_ptr(), data<float>(db));
  }
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
    const cuda::LowRank low_rank{lora.left, lora.factor, lora.rank, lora.left_beside};
    const Workspace scratch(y, cuda::linear_4bit_workspace(weight, x.dtype, x.rows, low_rank));
    cuda::linear_4bit(weight, x.dtype, x.rows, x.data(), bias, low_rank, y.data_ptr(), scratch.data, stream_);
  }
  void linear_4bit_dx(const QuantizedMatrix& weight, const Activation& dy, const LowRankTerm& lora,
                      const Dropout& dropout, Tensor& dx) const {
    const cuda::LowRank low_rank{lora.left, lora.factor, lora.rank, lora.left_beside};
    const Workspace scratch(dx, cuda::linear_4bit_dx_workspace(weight, dy.dtype, dy.rows, low_rank));
    cuda::linear_4bit_dx(weight, dy.dtype, dy.rows, dy.data(), low_rank, dropout, dx.data_ptr(), scratch.data, stream_);
  }
  void lora_down(const QuantizedMatrix& weight, const Activation& x, int64_t rank, const Tensor& a, float scaling,
                 const Dropout& dropout, Tensor& xa) const {
    cuda::lora_down(weight, x.dtype, x.rows, rank, x.data(), a.data_ptr(), scaling, dropout, xa.data_ptr(), stream_);
  }
  void lora_dya(const QuantizedMatrix& weight, const Activation& dy, int64_t rank, const Tensor& b, float scaling,
                bool beside, Tensor& dya) const {
    cuda::lora_dya(weight, dy.dtype, dy.rows, rank, dy.data(), b.data_ptr(), scaling, beside, dya.data_ptr(), stream_);
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
