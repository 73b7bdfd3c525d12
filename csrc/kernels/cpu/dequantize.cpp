#include "kernels/cpu/dequantize.h"

#include <algorithm>

#include "kernels/cpu/dequantize_range.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/pages.h"
#include "kernels/cpu/parallel.h"

namespace pyquant::cpu {
namespace {

DequantizeRange choose() {
#if PYQUANT_X86
  if (isa() >= Isa::kAvx512) return dequantize_range_avx512;
  if (isa() >= Isa::kAvx2) return dequantize_range_avx2;
#endif
  return dequantize_range;
}

}  // namespace

void dequantize_4bit(const QuantizedMatrix& weight, DType dtype, void* output) {
  const DequantizeRange range = choose();
  const int64_t numel = weight.numel();
  prefer_huge_pages(output, static_cast<size_t>(numel * size_of(dtype)));
  constexpr int64_t kChunk = 4096;  // a multiple of every block size: no block is shared between threads
  parallel_for((numel + kChunk - 1) / kChunk, 8, [&](int64_t begin, int64_t end) {
    range(weight, dtype, begin * kChunk, std::min(numel, end * kChunk), output);
  });
}

}  // namespace pyquant::cpu
