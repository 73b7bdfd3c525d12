#include "kernels/cpu/isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#if PYQUANT_X86
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace pyquant::cpu {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512", "amx"};

#if PYQUANT_X86

struct CpuidLeaf {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

CpuidLeaf cpuid(unsigned leaf, unsigned subleaf) {
  CpuidLeaf result;
  if (!__get_cpuid_count(leaf, subleaf, &result.eax, &result.ebx, &result.ecx, &result.edx)) return {};
  return result;
}

// Linux hands tile registers only to a process that asks for them.
bool tiles_permitted() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr int kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr int kTileData = 18;               // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Isa detect() {
  // __builtin_cpu_supports also checks that the operating system saves the registers.
  __builtin_cpu_init();
  const bool f16c = cpuid(1, 0).ecx & (1u << 29);
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c)) return Isa::kPortable;
  if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))) {
    return Isa::kAvx2;
  }
  const bool avx512_vbmi = cpuid(7, 0).ecx & (1u << 1);
  const bool avx512_bf16 = cpuid(7, 1).eax & (1u << 5);
  const unsigned features = cpuid(7, 0).edx;
  const bool amx_bf16 = features & (1u << 22), amx_tile = features & (1u << 24);
  if (avx512_vbmi && avx512_bf16 && amx_bf16 && amx_tile && tiles_permitted()) return Isa::kAmx;
  return Isa::kAvx512;
}

#else

Isa detect() { return Isa::kPortable; }

#endif

Isa available() {
  static const Isa found = detect();
  return found;
}

Isa initial() {
  Isa limit = available();
  if (const char* wanted = std::getenv("PYQUANT_CPU_ISA")) {
    for (int i = 0; i < static_cast<int>(limit); ++i) {
      if (std::strcmp(wanted, kNames[i]) == 0) limit = static_cast<Isa>(i);
    }
  }
  return limit;
}

std::atomic<Isa>& current() {
  static std::atomic<Isa> value{initial()};
  return value;
}

}  // namespace

Isa isa() { return current().load(std::memory_order_relaxed); }

bool set_isa(Isa wanted) {
  if (wanted > available()) return false;
  current().store(wanted, std::memory_order_relaxed);
  return true;
}

const char* isa_name() { return kNames[static_cast<int>(isa())]; }

}  // namespace pyquant::cpu
