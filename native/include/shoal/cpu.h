// What the processor and the operating system allow. Compiled with baseline flags.
#pragma once

namespace shoal {

bool cpu_has_scalar();  // always true
bool cpu_has_avx2();    // x86-64-v3: AVX2, FMA, F16C, BMI
bool cpu_has_avx512();  // x86-64-v4 with VNNI and BF16; a machine that lacks one of them runs avx2
bool cpu_has_neon();    // Armv8.2-A with the int8 dot product

}  // namespace shoal
