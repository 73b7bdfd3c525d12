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

// The factors in their own dtypes: float32 often, beside 16-bit activations. The products run in the dtype of the
// activations.
struct Adapter {
  Tensor a;  // [rank, k]
  Tensor b;  // [n, rank]
  int64_t rank;
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
  void linear_4bit(const QuantizedMatrix& weight, const Activation& x, const void* bias, const cpu::LowRank& lora,
                   Tensor& y) const {
    cpu::linear_4bit(weight, x.dtype, x.rows, x.data(), bias, lora, y.data_ptr());
  }
  void linear_4bit_dx(const QuantizedMatrix& weight, const Activation& dy, const cpu::LowRank& lora,
                      const Dropout& dropout, Tensor& dx) const {
    cpu::linear_4bit_dx(weight, dy.dtype, dy.rows, dy.data(), lora, dropout, dx.data_ptr());
  }
  void lora_linear_4bit(const QuantizedMatrix& weight, const Activation& x, const void* bias, const Adapter& adapter,
                        float scaling, const Dropout& dropout, Tensor& xa, Tensor& y) const {
    const int64_t rank = adapter.rank;
    const Tensor a = in_dtype(adapter.a, x.dtype), b = in_dtype(adapter.b, x.dtype);
    cpu::lora_down(x.dtype, x.rows, weight.k, rank, x.data(), a.data_ptr(), scaling, dropout, xa.data_ptr());
    linear_4bit(weight, x, bias, {xa.data_ptr(), b.data_ptr(), rank}, y);
  }
  void lora_linear_4bit_dx(const QuantizedMatrix& weight, const Activation& dy, const Adapter& adapter, float scaling,
                           const Dropout& dropout, bool needs_dx, Tensor& dya, Tensor& dx) const {
    const int64_t rank = adapter.rank;
    const Tensor b = in_dtype(adapter.b, dy.dtype);
    cpu::lora_dya(dy.dtype, dy.rows, weight.n, rank, dy.data(), b.data_ptr(), scaling, dya.data_ptr());
    if (!needs_dx) return;
    const Tensor a = in_dtype(adapter.a, dy.dtype);
    linear_4bit_dx(weight, dy, {dya.data_ptr(), a.data_ptr(), rank}, dropout, dx);
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
  void linear_4bit(const QuantizedMatrix& weight, const Activation& x, const void* bias, const cuda::LowRank& lora,
                   Tensor& y) const {
    const Workspace scratch(y,
                            cuda::linear_workspace(LinearDirection::kForward, weight, x.dtype, x.rows, x.data(), lora));
    const bool prepared =
        cuda::linear_prepare(LinearDirection::kForward, weight, x.dtype, x.rows, x.data(), lora, scratch.data, stream_);
    cuda::linear_4bit(weight, x.dtype, x.rows, x.data(), bias, lora, y.data_ptr(), scratch.data, prepared, stream_);
  }
  void linear_4bit_dx(const QuantizedMatrix& weight, const Activation& dy, const cuda::LowRank& lora,
                      const Dropout& dropout, Tensor& dx) const {
    const Workspace scratch(dx,
                            cuda::linear_workspace(LinearDirection::kDx, weight, dy.dtype, dy.rows, dy.data(), lora));
    const bool prepared =
        cuda::linear_prepare(LinearDirection::kDx, weight, dy.dtype, dy.rows, dy.data(), lora, scratch.data, stream_);
    cuda::linear_4bit_dx(weight, dy.dtype, dy.rows, dy.data(), lora, dropout, dx.data_ptr(), scratch.data, prepared,
                         stream_);
  }
  // The adapter's product and the linear behind it overlap, so whatever is to be cast is cast before both.
  void lora_linear_4bit(const QuantizedMatrix& weight, const Activation& x, const void* bias, const Adapter& adapter,
                        float scaling, const Dropout& dropout, Tensor& xa, Tensor& y) const {
    const int64_t rank = adapter.rank;
    cuda::LowRank lora{xa.data_ptr(), adapter.b.data_ptr(), rank, !dropout.active(), false};
    const auto word = [&] {
      return dropout.active() ? nullptr
                              : cuda::take_word(LinearDirection::kForward, weight, x.dtype, x.rows, rank, stream_);
    };
    const Workspace scratch(y,
                            cuda::linear_workspace(LinearDirection::kForward, weight, x.dtype, x.rows, x.data(), lora));
    const bool prepared =
        cuda::linear_prepare(LinearDirection::kForward, weight, x.dtype, x.rows, x.data(), lora, scratch.data, stream_);
    const Factor b(
        adapter.b, x.dtype,
        [&] { return cuda::linear_reads_float(LinearDirection::kForward, weight, x.dtype, x.rows, x.data(), lora); },
        stream_);
    // The last launch before lora_down: where it sets a word, all else has to be in place.
    const Factor a(
        adapter.a, x.dtype, [&] { return cuda::lora_down_reads_float(x.dtype, x.rows, dropout); }, stream_, word);
    lora.factor = b.data(), lora.float_factor = b.is_float;
    lora.begun = cuda::lora_down(weight, x.dtype, x.rows, rank, x.data(), a.data(), a.is_float, scaling, dropout,
                                 xa.data_ptr(), a.begun, stream_);
    cuda::linear_4bit(weight, x.dtype, x.rows, x.data(), bias, lora, y.data_ptr(), scratch.data, prepared, stream_);
  }
  // dya, and dx if it is wanted.
  void lora_linear_4bit_dx(const QuantizedMatrix& weight, const Activation& dy, const Adapter& adapter, float scaling,
                           const Dropout& dropout, bool needs_dx, Tensor& dya, Tensor& dx) const {
    const int64_t rank = adapter.rank;
    cuda::LowRank lora{dya.data_ptr(), adapter.a.data_ptr(), rank, !dropout.active(), false};
    const bool beside = needs_dx && !dropout.active();
    const auto word = [&] {
      return beside ? cuda::take_word(LinearDirection::kDx, weight, dy.dtype, dy.rows, rank, stream_) : nullptr;
    };
    const Workspace scratch(
        dx, needs_dx ? cuda::linear_workspace(LinearDirection::kDx, weight, dy.dtype, dy.rows, dy.data(), lora) : 0);
    const bool prepared = needs_dx && cuda::linear_prepare(LinearDirection::kDx, weight, dy.dtype, dy.rows, dy.data(),
                                                           lora, scratch.data, stream_);
    std::optional<Factor> a;
    if (needs_dx) {
      a.emplace(
          adapter.a, dy.dtype,
          [&] { return cuda::linear_reads_float(LinearDirection::kDx, weight, dy.dtype, dy.rows, dy.data(), lora); },
          stream_);
      lora.factor = a->data(), lora.float_factor = a->is_float;
    }
    // The last launch before lora_dya, likewise.
    const Factor b(adapter.b, dy.dtype, [] { return false; }, stream_, word);
    lora.begun = cuda::lora_dya(weight, dy.dtype, dy.rows, rank, dy.data(), b.data(), scaling, beside, dya.data_ptr(),
                                b.begun, stream_);
    if (!needs_dx) return;
    cuda::linear_4bit_dx(weight, dy.dtype, dy.rows, dy.data(), lora, dropout, dx.data_ptr(), scratch.data, prepared,
                         stream_);
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

  static uint32_t* no_word() { return nullptr; }

  // A factor as its kernel takes it: in float32 beside 16-bit activations where the kernel reads that (`reads_float`),
  // else cast. The launch that rounds it to 16 bits sets a word for the linear, LowRank::begun, if there is one to
  // take.
  struct Factor {
    bool is_float;
    Tensor values;
    uint32_t* begun = nullptr;
    template <typename ReadsFloat, typename TakeWord = uint32_t* (*)()>
    Factor(const Tensor& factor, DType dtype, const ReadsFloat& reads_float, cudaStream_t stream,
           const TakeWord& take_word = no_word)
        : is_float(dtype != DType::kFloat32 && factor.scalar_type() == ScalarType::Float), values(factor) {
      if (!is_float) {
        values = in_dtype(factor, dtype);
      } else if (!reads_float()) {
        is_float = false;
        values = torch::stable::new_empty(factor, {factor.size(0), factor.size(1)}, scalar_type_of(dtype));
        begun = take_word();
        cuda::round_factor(dtype, ops::data<float>(factor), factor.numel(), values.data_ptr(), begun, stream);
      }
    }
    const void* data() const { return values.data_ptr(); }
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
