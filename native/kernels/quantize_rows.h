// Activations to int8: one scale for 32 values, the largest of them becoming 127. See ops.h for shapes.
//
// No step is left to the instruction set (one division, one product and one rounding a value), so every table gives the
// same bits.
#pragma once

#include "simd/common.h"

namespace shoal::SHOAL_ISA {
namespace {

// Groups of smaller values count as zeros: 127 / largest would overflow.
constexpr float kSmallestGroup = 1e-36f;

// The largest magnitude of n <= 32 values; NaN if one of them is not finite, so that a fault upstream stays visible.
SHOAL_INLINE float largest_of_group(const float* x, int64_t n) {
    F32 top = zero(), faults = zero();
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        const F32 v = load(x + i);
        top = max(top, max(v, sub(zero(), v)));
        faults = fma(v, zero(), faults);
    }
    if (i < n) {
        const F32 v = load_n(x + i, static_cast<int>(n - i));
        top = max(top, max(v, sub(zero(), v)));
        faults = fma(v, zero(), faults);
    }
    return max_of(top) + sum(faults);
}

// Rounds to nearest even by adding 1.5 * 2^23, whose lowest byte then is the code: no conversion instruction, so the
// loop vectorises on every instruction set.
SHOAL_INLINE int32_t quantise_group(const float* x, int64_t n, float inverse, int8_t* codes) {
    int32_t total = 0;
    for (int64_t k = 0; k < n; ++k) {
        const float shifted = read<float>(x + k) * inverse + 12582912.0f;
        const int8_t code = static_cast<int8_t>(__builtin_bit_cast(uint32_t, shifted));
        codes[k] = code;
        total += code;
    }
    for (int64_t k = n; k < 32; ++k) {
        codes[k] = 0;
    }
    return total;
}

void quantize_rows(const float* const* x, int64_t rows, int64_t cols, int64_t lanes, int8_t* codes, float* scales,
                   int32_t* sums, float* rest) {
    const int64_t groups = (cols + 63) / 64 * 2;
    for (int64_t row = 0; row < (rows + lanes - 1) / lanes * lanes; ++row) {
        const int64_t lane = row % lanes;
        int8_t* block_codes = codes + row / lanes * lanes * groups * 32;
        const int64_t at = row / lanes * lanes * groups;
        for (int64_t g = 0; g < groups; ++g) {
            const int64_t left = row < rows ? cols - g * 32 : 0;
            const int64_t n = left < 0 ? 0 : left > 32 ? 32 : left;
            alignas(64) int8_t group[32];
            const float* x_G = n > 0 ? x[row] + g * 32 : nullptr;
            const float largest = n > 0 ? largest_of_group(x_G, n) : 0.0f;
            const float inverse = largest >= kSmallestGroup ? 127.0f / largest : 0.0f;
            const float scale = largest / 127.0f;
            scales[at + g * lanes + lane] = scale;
            sums[at + g * lanes + lane] =
                n == 32 ? quantise_group(x_G, 32, inverse, group) : quantise_group(x_G, n, inverse, group);
            if (rest != nullptr) {
                for (int64_t k = 0; k < n; ++k) {
                    rest[row * cols + g * 32 + k] = read<float>(x_G + k) - scale * static_cast<float>(group[k]);
                }
            }
            for (int64_t step = 0; step < 8; ++step) {
                __builtin_memcpy(block_codes + ((g * 8 + step) * lanes + lane) * 4, group + step * 4, 4);
            }
        }
    }
}

}  // namespace
}  // namespace shoal::SHOAL_ISA
