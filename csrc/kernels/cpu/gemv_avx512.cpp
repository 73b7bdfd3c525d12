#include "kernels/cpu/gemv_rows.h"

namespace pyquant::cpu {

const FewRowsKernel kFewRowsAvx512 = kFewRows;

}  // namespace pyquant::cpu
