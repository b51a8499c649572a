// Cached int8 rows to bf16, 64 values to a scale. See ops.h for shapes.
#pragma once

#include "simd/common.h"

namespace shoal::SHOAL_ISA {
namespace {

void widen_rows(const uint8_t* x, int64_t row_bytes, int64_t scales_at, int64_t rows, int64_t width, uint16_t* y) {
    for (int64_t row = 0; row < rows; ++row) {
        const auto* codes = reinterpret_cast<const int8_t*>(x + row * row_bytes);
        for (int64_t first = 0; first < width; first += 64) {
            float scale;
            __builtin_memcpy(&scale, x + row * row_bytes + scales_at + first / 64 * 4, 4);
            const int64_t last = first + 64 < width ? first + 64 : width;
            int64_t i = first;
            for (; i + kLanes <= last; i += kLanes) {
                store_bf16(y + row * width + i, mul(to_f32(load_codes(codes + i)), set1(scale)));
            }
            for (; i < last; ++i) {
                store_bf16_n(y + row * width + i, set1(static_cast<float>(codes[i]) * scale), 1);
            }
        }
    }
}

}  // namespace
}  // namespace shoal::SHOAL_ISA
