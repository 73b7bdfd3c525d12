#include "kernels/cpu/gemm_float.h"

namespace pyquant::cpu {

const Engine kEnginePortable = kEngine;

}  // namespace pyquant::cpu
