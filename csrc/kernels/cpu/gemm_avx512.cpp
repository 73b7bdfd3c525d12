#include "kernels/cpu/gemm_float.h"

namespace pyquant::cpu {

const Engine kEngineAvx512 = kEngine;

}  // namespace pyquant::cpu
