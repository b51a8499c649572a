// f32 rows to bf16, times a number. See ops.h for shapes.
#pragma once

#include "simd/common.h"

namespace shoal::SHOAL_ISA {
namespace {

void narrow_rows(const float* x, int64_t x_stride, float scale, uint16_t* y, int64_t y_stride, int64_t rows,
                 int64_t cols) {
    const F32 factor = set1(scale);
    for (int64_t row = 0; row < rows; ++row, x += x_stride, y += y_stride) {
        int64_t i = 0;
        for (; i + kLanes <= cols; i += kLanes) {
            store_bf16(y + i, mul(load(x + i), factor));
        }
        if (i < cols) {
            const int left = static_cast<int>(cols - i);
            store_bf16_n(y + i, mul(load_n(x + i, left), factor), left);
        }
    }
}

}  // namespace
}  // namespace shoal::SHOAL_ISA
