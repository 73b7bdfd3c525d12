// Descriptions of matrices for the tensor memory accelerator (sm_90 and later), encoded by the driver on the host.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace pyquant::cuda {

// A row-major matrix of `columns` elements of `type` a row, rows `pitch` bytes apart, of which boxes of box_rows ×
// box_columns are copied to shared memory, there swizzled as `swizzle` says. `base` and `pitch` are multiples of 16
// bytes. Throws std::runtime_error if the driver refuses.
CUtensorMap make_tensor_map(const void* base, CUtensorMapDataType type, int64_t rows, int64_t columns, int64_t pitch,
                            int box_rows, int box_columns, CUtensorMapSwizzle swizzle);

}  // namespace pyquant::cuda
