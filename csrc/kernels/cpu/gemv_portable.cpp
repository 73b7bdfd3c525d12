#include "kernels/cpu/gemv_rows.h"

namespace pyquant::cpu {

const FewRowsKernel kFewRowsPortable = kFewRows;

}  // namespace pyquant::cpu
