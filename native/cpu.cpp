#include "shoal/cpu.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace shoal {

bool cpu_has_scalar() { return true; }

#if defined(__x86_64__)

// __builtin_cpu_supports also asks XGETBV, so a yes means that the system saves the wide registers.
bool cpu_has_avx2() {
    __builtin_cpu_init();
    if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
          __builtin_cpu_supports("bmi2"))) {
        return false;
    }
    // -march=x86-64-v3 may also emit these three, whose names older compilers do not know.
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx & bit_F16C) || !(ecx & bit_MOVBE)) {
        return false;
    }
    return __get_cpuid(0x80000001, &eax, &ebx, &ecx, &edx) && (ecx & bit_LZCNT);
}

bool cpu_has_avx512() {
    return cpu_has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") &&
           __builtin_cpu_supports("avx512bf16");
}

bool cpu_has_neon() { return false; }

#elif defined(__aarch64__)

bool cpu_has_avx2() { return false; }
bool cpu_has_avx512() { return false; }

#if defined(__linux__)
bool cpu_has_neon() {
    const unsigned long needed = HWCAP_ASIMD | HWCAP_ASIMDDP | HWCAP_ATOMICS | HWCAP_ASIMDRDM | HWCAP_CRC32;
    return (getauxval(AT_HWCAP) & needed) == needed;
}
#elif defined(__APPLE__)
bool cpu_has_neon() {
    int has = 0;
    size_t size = sizeof(has);
    return sysctlbyname("hw.optional.arm.FEAT_DotProd", &has, &size, nullptr, 0) == 0 && has;
}
#else
bool cpu_has_neon() { return false; }
#endif

#else

bool cpu_has_avx2() { return false; }
bool cpu_has_avx512() { return false; }
bool cpu_has_neon() { return false; }

#endif

}  // namespace shoal
