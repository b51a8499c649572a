// Softmax of each row, less its largest element so that nothing overflows. See ops.h for shapes.
#pragma once

#include "simd/math.h"

namespace shoal::SHOAL_ISA {
namespace {

SHOAL_INLINE float row_max(const float* x_S, F32 scale, int64_t cols) {
    F32 top = set1(-__builtin_inff());
    int64_t i = 0;
    for (; i + kLanes <= cols; i += kLanes) {
        top = max(mul(load(x_S + i), scale), top);
    }
    for (; i < cols; ++i) {  // one by one: the zeros that load_n reads beyond the row must not count
        top = max(mul(set1(sum(load_n(x_S + i, 1))), scale), top);
    }
    return max_of(top);
}

void softmax(const float* x, int64_t x_stride, float scale, float* y, int64_t y_stride, int64_t rows, int64_t cols) {
    const F32 scale_v = set1(scale);
    for (int64_t row = 0; row < rows; ++row) {
        const float* x_S = x + row * x_stride;
        float* y_S = y + row * y_stride;
        const F32 top = set1(row_max(x_S, scale_v, cols));
        F32 total = zero();
        int64_t i = 0;
        for (; i + kLanes <= cols; i += kLanes) {
            const F32 e = exp(sub(mul(load(x_S + i), scale_v), top));
            store(y_S + i, e);
            total = add(total, e);
        }
        float tail = 0.0f;
        if (i < cols) {
            const int n = static_cast<int>(cols - i);
            store_n(y_S + i, exp(sub(mul(load_n(x_S + i, n), scale_v), top)), n);
            tail = sum(load_n(y_S + i, n));
        }
        const F32 inverse = set1(1.0f / (sum(total) + tail));
        for (i = 0; i + kLanes <= cols; i += kLanes) {
            store(y_S + i, mul(load(y_S + i), inverse));
        }
        if (i < cols) {
            const int n = static_cast<int>(cols - i);
            store_n(y_S + i, mul(load_n(y_S + i, n), inverse), n);
        }
    }
}

}  // namespace
}  // namespace shoal::SHOAL_ISA
