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

// y = exp(scale * x - top); returns the sum of y.
SHOAL_INLINE float exp_row(const float* x_S, F32 scale, F32 top, float* y_S, int64_t cols) {
    F32 total = zero();
    float tail = 0.0f;
    int64_t i = 0;
    for (; i + kLanes <= cols; i += kLanes) {
        const F32 e = exp(sub(mul(load(x_S + i), scale), top));
        store(y_S + i, e);
        total = add(total, e);
    }
    if (i < cols) {
        const int n = static_cast<int>(cols - i);
        store_n(y_S + i, exp(sub(mul(load_n(x_S + i, n), scale), top)), n);
        tail = sum(load_n(y_S + i, n));
    }
    return sum(total) + tail;
}

SHOAL_INLINE void scale_row(float* y_S, F32 factor, int64_t cols) {
    int64_t i = 0;
    for (; i + kLanes <= cols; i += kLanes) {
        store(y_S + i, mul(load(y_S + i), factor));
    }
    if (i < cols) {
        const int n = static_cast<int>(cols - i);
        store_n(y_S + i, mul(load_n(y_S + i, n), factor), n);
    }
}

void softmax(const float* x, int64_t x_stride, float scale, float* y, int64_t y_stride, int64_t rows, int64_t cols) {
    constexpr int64_t kBlock = 256;  // a row's blocks are summed in double: one running float would lose long rows
    const F32 scales = set1(scale);
    for (int64_t row = 0; row < rows; ++row) {
        const float* x_S = x + row * x_stride;
        float* y_S = y + row * y_stride;
        const F32 top = set1(row_max(x_S, scales, cols));
        double total = 0.0;
        for (int64_t i = 0; i < cols; i += kBlock) {
            const int64_t n = cols - i < kBlock ? cols - i : kBlock;
            total += static_cast<double>(exp_row(x_S + i, scales, top, y_S + i, n));
        }
        scale_row(y_S, set1(static_cast<float>(1.0 / total)), cols);
    }
}

}  // namespace
}  // namespace shoal::SHOAL_ISA
