#include "kernels/cpu/scratch.h"

#include <new>

namespace pyquant::cpu {
namespace {

constexpr std::align_val_t kAlignment{64};

class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  ~Buffer() { release(); }

  void* at_least(size_t bytes) {
    if (bytes > size_) {
      release();
      data_ = ::operator new(bytes, kAlignment);
      size_ = bytes;
    }
    return data_;
  }

 private:
  void release() {
    if (data_ != nullptr) ::operator delete(data_, kAlignment);
    data_ = nullptr;
    size_ = 0;
  }

  void* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace

void* scratch(int slot, size_t bytes) {
  thread_local Buffer buffers[4];
  return buffers[slot].at_least(bytes);
}

}  // namespace pyquant::cpu
