// Root-mean-square normalisation (Zhang and Sennrich 2019). See ops.h for shapes.
#pragma once

namespace shoal::SHOAL_ISA {
namespace {

SHOAL_INLINE float sum_of_squares(const float* x_D, int64_t cols) {
    F32 acc[4] = {zero(), zero(), zero(), zero()};
    int64_t i = 0;
    for (; i + 4 * kLanes <= cols; i += 4 * kLanes) {
        for (int k = 0; k < 4; ++k) {
            const F32 v = load(x_D + i + k * kLanes);
            acc[k] = fma(v, v, acc[k]);
        }
    }
    for (; i + kLanes <= cols; i += kLanes) {
        const F32 v = load(x_D + i);
        acc[0] = fma(v, v, acc[0]);
    }
    if (i < cols) {
        const F32 v = load_n(x_D + i, static_cast<int>(cols - i));
        acc[1] = fma(v, v, acc[1]);
    }
    return sum(add(add(acc[0], acc[1]), add(acc[2], acc[3])));
}

void rms_norm(const float* x, int64_t x_stride, const float* weight, float eps, float* y, int64_t y_stride,
              int64_t rows, int64_t cols) {
    for (int64_t row = 0; row < rows; ++row) {
        const float* x_D = x + row * x_stride;
        float* y_D = y + row * y_stride;
        const float mean = sum_of_squares(x_D, cols) / static_cast<float>(cols);
        const F32 scale = set1(1.0f / __builtin_sqrtf(mean + eps));
        int64_t i = 0;
        for (; i + kLanes <= cols; i += kLanes) {
            store(y_D + i, mul(mul(load(x_D + i), scale), load(weight + i)));
        }
        if (i < cols) {
            const int n = static_cast<int>(cols - i);
            store_n(y_D + i, mul(mul(load_n(x_D + i, n), scale), load_n(weight + i, n)), n);
        }
    }
}

}  // namespace
}  // namespace shoal::SHOAL_ISA
