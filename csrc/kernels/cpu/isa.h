// Which instruction set the kernels run on: the widest that this processor and its operating system offer, unless the
// environment variable PYQUANT_CPU_ISA (portable, avx2, avx512 or amx) asks for a narrower one.
//
// A file whose name ends in _avx2, _avx512 or _amx is compiled for that instruction set and is only ever called after
// isa() said that it may be. So that no function compiled for a wide instruction set can stand in for one that runs
// everywhere, such a file defines nothing with external linkage but its entry points: its helpers live in anonymous
// namespaces (those of the headers it includes too), and it calls no inline function or template of another header.
#pragma once

namespace pyquant::cpu {

enum class Isa : int { kPortable, kAvx2, kAvx512, kAmx };

// Chosen at the first call. kAmx means AVX-512 with bf16 and VBMI, and tiles with bf16 products.
Isa isa();

// For tests: use `wanted` from now on. False, and nothing changes, where the processor lacks it.
bool set_isa(Isa wanted);

// The name that PYQUANT_CPU_ISA takes.
const char* isa_name();

}  // namespace pyquant::cpu
