// y += low B^T, B kept transposed: what a low-rank adapter adds to a matrix's output. See ops.h for shapes.
#pragma once

#include "simd/common.h"

namespace shoal::SHOAL_ISA {
namespace {

void lora_expand(const float* low, int64_t low_stride, int64_t rows, int64_t rank, const uint16_t* b, int64_t b_stride,
                 int64_t cols, float* y, int64_t y_stride) {
    for (int64_t row = 0; row < rows; ++row) {
        const float* low_R = low + row * low_stride;
        float* y_O = y + row * y_stride;
        int64_t i = 0;
        for (; i + 2 * kLanes <= cols; i += 2 * kLanes) {
            F32 first = load(y_O + i), second = load(y_O + i + kLanes);
            for (int64_t r = 0; r < rank; ++r) {
                const F32 factor = set1(low_R[r]);
                first = fma(factor, load_bf16(b + r * b_stride + i), first);
                second = fma(factor, load_bf16(b + r * b_stride + i + kLanes), second);
            }
            store(y_O + i, first);
            store(y_O + i + kLanes, second);
        }
        for (; i < cols; i += kLanes) {
            const int n = static_cast<int>(cols - i < kLanes ? cols - i : kLanes);
            F32 sum = load_n(y_O + i, n);
            for (int64_t r = 0; r < rank; ++r) {
                sum = fma(set1(low_R[r]), load_bf16_n(b + r * b_stride + i, n), sum);
            }
            store_n(y_O + i, sum, n);
        }
    }
}

}  // namespace
}  // namespace shoal::SHOAL_ISA
