// Double quantization's second pass, to the bytes of bitsandbytes' CPU library. It decides through a table: the
// normalised value is rounded to the nearest of 65536 evenly spaced points of [-1, 1], and each point has the code
// nearest to it. A code can therefore differ from the nearest one to the value itself.
#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/cpu/kernels.h"
#include "kernels/cpu/parallel.h"

namespace pyquant::cpu {
namespace {

constexpr int kPoints = 65536;

float point(int index) { return static_cast<float>(index) * 2.0f / 65535.0f - 1.0f; }

// table[i] = how many of the 255 midpoints of neighbouring codes lie below point i.
std::vector<uint8_t> nearest_codes(const float* code) {
  std::vector<uint8_t> table(kPoints);
  int filled = 0;
  for (int index = 0; index < 255 && filled < kPoints; ++index) {
    const float midpoint = (code[index] + code[index + 1]) * 0.5f;
    if (std::isnan(midpoint)) continue;
    // The first point above the midpoint: a guess, then corrected for the points' own rounding.
    int first = static_cast<int>(std::clamp((midpoint + 1.0f) * 32767.5f, 0.0f, 65535.0f));
    while (first > 0 && point(first - 1) > midpoint) --first;
    while (first < kPoints && !(point(first) > midpoint)) ++first;
    first = std::max(first, filled);
    std::fill(table.begin() + filled, table.begin() + first, static_cast<uint8_t>(index));
    filled = first;
  }
  std::fill(table.begin() + filled, table.end(), uint8_t{255});
  return table;
}

int nearest_point(float value) {
  value = std::clamp(value, -1.0f, 1.0f);
  if (std::isnan(value)) return 0;
  // bitsandbytes uses a fused multiply-add. In double both operations are exact, so the cast rounds just as it does.
  const float scaled = static_cast<float>(static_cast<double>((value + 1.0f) * 0.5f) * 65535.0 + 0.5);
  return static_cast<int>(scaled) & (kPoints - 1);
}

}  // namespace

void quantize_absmax(const float* absmax, int64_t blocks, const float* offset, const float* code, uint8_t* absmax_codes,
                     float* nested_absmax) {
  if (blocks <= 0) return;
  const std::vector<uint8_t> table = nearest_codes(code);
  const float mean = *offset;
  const int64_t nested_blocks = (blocks + kNestedBlocksize - 1) / kNestedBlocksize;
  parallel_for(nested_blocks, 16, [&](int64_t begin, int64_t end) {
    for (int64_t nested = begin; nested < end; ++nested) {
      const int64_t first = nested * kNestedBlocksize;
      const int64_t count = std::min(kNestedBlocksize, blocks - first);
      float centred[kNestedBlocksize];
      float largest = 0.0f;
      for (int64_t i = 0; i < count; ++i) {
        centred[i] = absmax[first + i] - mean;
        largest = std::max(largest, std::fabs(centred[i]));
      }
      nested_absmax[nested] = largest;
      if (largest == 0.0f) {
        std::fill_n(absmax_codes + first, count, uint8_t{0});
        continue;
      }
      const float inverse = 1.0f / largest;
      for (int64_t i = 0; i < count; ++i) absmax_codes[first + i] = table[nearest_point(centred[i] * inverse)];
    }
  });
}

}  // namespace pyquant::cpu
