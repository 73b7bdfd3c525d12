#include "kernels/cpu/gemm_float.h"

namespace pyquant::cpu {

const Engine kEngineAvx2 = kEngine;

}  // namespace pyquant::cpu
