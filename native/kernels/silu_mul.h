// The gate of SwiGLU (Shazeer 2020): silu(gate) * up. See ops.h for shapes.
#pragma once

#include "simd/math.h"

namespace shoal::SHOAL_ISA {
namespace {

SHOAL_INLINE F32 silu_mul_lanes(F32 gate, F32 up) {
    const F32 denominator = add(set1(1.0f), exp(sub(zero(), gate)));
    return mul(div(gate, denominator), up);
}

void silu_mul(const float* gate, int64_t gate_stride, const float* up, int64_t up_stride, float* y, int64_t y_stride,
              int64_t rows, int64_t cols) {
    for (int64_t row = 0; row < rows; ++row) {
        const float* gate_F = gate + row * gate_stride;
        const float* up_F = up + row * up_stride;
        float* y_F = y + row * y_stride;
        int64_t i = 0;
        for (; i + kLanes <= cols; i += kLanes) {
            store(y_F + i, silu_mul_lanes(load(gate_F + i), load(up_F + i)));
        }
        if (i < cols) {
            const int n = static_cast<int>(cols - i);
            store_n(y_F + i, silu_mul_lanes(load_n(gate_F + i, n), load_n(up_F + i, n)), n);
        }
    }
}

}  // namespace
}  // namespace shoal::SHOAL_ISA
