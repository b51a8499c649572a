// Activations to int8: one scale for 32 values, the largest of them becoming 127. See ops.h for shapes.
//
// No step is left to the instruction set (one division, one product and one rounding a value), so every table gives the
// same bits.
#pragma once

#include "simd/common.h"

namespace shoal::SHOAL_ISA {
namespace {

constexpr int kGroupParts = 32 / kLanes;  // vectors in a group
// Groups of smaller values count as zeros: 127 / largest would overflow.
constexpr float kSmallestGroup = 1e-36f;

// Codes of 32 values and their sum; what the codes leave goes to `rest` if it is not null. Returns the scale, which is
// NaN if one of the values is not finite, so that a fault upstream stays visible.
SHOAL_INLINE float quantise_group(const float* x, int8_t* codes, int32_t* total, float* rest) {
    F32 values[kGroupParts];
    F32 top = zero(), faults = zero();
#pragma GCC unroll 4
    for (int i = 0; i < kGroupParts; ++i) {
        values[i] = load(x + i * kLanes);
        top = max(top, max(values[i], sub(zero(), values[i])));
        faults = fma(values[i], zero(), faults);
    }
    const float largest = max_of(top) + sum(faults), scale = largest / 127.0f;
    if (!(largest >= kSmallestGroup)) {
        __builtin_memset(codes, 0, 32);
        *total = 0;
        if (rest != nullptr) {
            __builtin_memcpy(rest, x, 32 * sizeof(float));
        }
        return scale;
    }
    const F32 inverse = set1(127.0f / largest);
    I32 sums = izero();
#pragma GCC unroll 4
    for (int i = 0; i < kGroupParts; ++i) {
        const I32 code = round_i32(mul(values[i], inverse));
        store_codes(codes + i * kLanes, code);
        sums = iadd(sums, code);
        if (rest != nullptr) {
            store(rest + i * kLanes, sub(values[i], mul(set1(scale), to_f32(code))));
        }
    }
    *total = isum(sums);
    return scale;
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
            alignas(64) float padded[32], left_over[32];
            const bool whole = n == 32;
            if (!whole) {
                __builtin_memset(padded, 0, sizeof(padded));
                if (n > 0) {
                    __builtin_memcpy(padded, x[row] + g * 32, static_cast<uint64_t>(n) * sizeof(float));
                }
            }
            float* rest_G = rest == nullptr || n == 0 ? nullptr : whole ? rest + row * cols + g * 32 : left_over;
            scales[at + g * lanes + lane] =
                quantise_group(whole ? x[row] + g * 32 : padded, group, &sums[at + g * lanes + lane], rest_G);
            if (!whole && rest_G != nullptr) {
                __builtin_memcpy(rest + row * cols + g * 32, left_over, static_cast<uint64_t>(n) * sizeof(float));
            }
            if (lanes == 1) {
                __builtin_memcpy(block_codes + g * 32, group, 32);
                continue;
            }
#pragma GCC unroll 8
            for (int64_t step = 0; step < 8; ++step) {
                __builtin_memcpy(block_codes + ((g * 8 + step) * 4 + lane) * 4, group + step * 4, 4);
            }
        }
    }
}

}  // namespace
}  // namespace shoal::SHOAL_ISA
