// low = scale x A^T: rows onto the few directions of a low-rank adapter. See ops.h for shapes.
#pragma once

#include "simd/common.h"

namespace shoal::SHOAL_ISA {
namespace {

// R rows of A with one of x, two running sums each; the order of additions is the same for every R.
template <int R>
SHOAL_INLINE void project(const float* x_C, int64_t cols, const uint16_t* a_RC, float scale, float* low) {
    F32 sums[2][R];
    for (int s = 0; s < 2; ++s) {
        for (int r = 0; r < R; ++r) {
            sums[s][r] = zero();
        }
    }
    int64_t i = 0;
    for (; i + 2 * kLanes <= cols; i += 2 * kLanes) {
        for (int s = 0; s < 2; ++s) {
            const F32 v = load(x_C + i + s * kLanes);
            for (int r = 0; r < R; ++r) {
                sums[s][r] = fma(v, load_bf16(a_RC + r * cols + i + s * kLanes), sums[s][r]);
            }
        }
    }
    if (i + kLanes <= cols) {
        const F32 v = load(x_C + i);
        for (int r = 0; r < R; ++r) {
            sums[0][r] = fma(v, load_bf16(a_RC + r * cols + i), sums[0][r]);
        }
        i += kLanes;
    }
    if (i < cols) {
        const int n = static_cast<int>(cols - i);
        const F32 v = load_n(x_C + i, n);
        for (int r = 0; r < R; ++r) {
            sums[1][r] = fma(v, load_bf16_n(a_RC + r * cols + i, n), sums[1][r]);
        }
    }
    for (int r = 0; r < R; ++r) {
        low[r] = scale * sum(add(sums[0][r], sums[1][r]));
    }
}

void lora_shrink(const float* x, int64_t x_stride, int64_t rows, int64_t cols, const uint16_t* a, int64_t rank,
                 float scale, float* low, int64_t low_stride) {
    for (int64_t row = 0; row < rows; ++row) {
        int64_t r = 0;
        for (; r + 4 <= rank; r += 4) {
            project<4>(x + row * x_stride, cols, a + r * cols, scale, low + row * low_stride + r);
        }
        for (; r < rank; ++r) {
            project<1>(x + row * x_stride, cols, a + r * cols, scale, low + row * low_stride + r);
        }
    }
}

}  // namespace
}  // namespace shoal::SHOAL_ISA
