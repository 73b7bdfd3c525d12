#include "kernels/cpu/gemv_rows.h"

namespace pyquant::cpu {

const FewRowsKernel kFewRowsAvx2 = kFewRows;

}  // namespace pyquant::cpu
