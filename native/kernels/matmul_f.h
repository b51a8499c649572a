// y = x W^T with W packed in f32 or bf16 (packed.h) and x in f32. See ops.h for shapes.
#pragma once

#include "kernels/matmul_q.h"
#include "shoal/packed.h"
#include "simd/common.h"

namespace shoal::SHOAL_ISA {
namespace {

template <bool Bf16>
SHOAL_INLINE F32 weights_at(const uint8_t* block, int64_t k, int part) {
    if constexpr (Bf16) {
        return load_bf16(reinterpret_cast<const uint16_t*>(block) + k * 16 + part * kLanes);
    } else {
        return load(reinterpret_cast<const float*>(block) + k * 16 + part * kLanes);
    }
}

// T tokens against one tile. Two running sums a token, or a lone token's every step would wait for the one before; the
// order of additions is the same for every T, so a row's result does not depend on its company.
template <bool Bf16, int T>
SHOAL_INLINE void float_tile(F32 (&acc)[T][kParts], const uint8_t* tile, int64_t cols, const float* x,
                             int64_t x_stride) {
    constexpr int64_t bytes = 64 * 16 * (Bf16 ? 2 : 4);
    constexpr int kSums = 2;
    F32 sums[kSums][T][kParts];
    for (int s = 0; s < kSums; ++s) {
        for (int t = 0; t < T; ++t) {
            for (int part = 0; part < kParts; ++part) {
                sums[s][t][part] = zero();
            }
        }
    }
    for (int64_t first = 0; first < cols; first += 64, tile += bytes) {
        const int64_t n = cols - first < 64 ? cols - first : 64;
        int64_t k = 0;
        for (; k + kSums <= n; k += kSums) {
#pragma GCC unroll 2
            for (int s = 0; s < kSums; ++s) {
#pragma GCC unroll 4
                for (int part = 0; part < kParts; ++part) {
                    const F32 w = weights_at<Bf16>(tile, k + s, part);
#pragma GCC unroll 4
                    for (int t = 0; t < T; ++t) {
                        sums[s][t][part] =
                            fma(w, set1(read<float>(x + t * x_stride + first + k + s)), sums[s][t][part]);
                    }
                }
            }
        }
        for (; k < n; ++k) {
            for (int part = 0; part < kParts; ++part) {
                const F32 w = weights_at<Bf16>(tile, k, part);
                for (int t = 0; t < T; ++t) {
                    sums[0][t][part] = fma(w, set1(read<float>(x + t * x_stride + first + k)), sums[0][t][part]);
                }
            }
        }
    }
    for (int t = 0; t < T; ++t) {
        for (int part = 0; part < kParts; ++part) {
            acc[t][part] = add(sums[0][t][part], sums[1][t][part]);
        }
    }
}

template <bool Bf16, int T>
void float_product(const uint8_t* tiles, int64_t count, int64_t cols, int64_t rows, const float* x, int64_t x_stride,
                   float* y, int64_t y_stride, bool add_to) {
    const int64_t tile_bytes = (cols + 63) / 64 * 64 * 16 * (Bf16 ? 2 : 4);
    for (int64_t tile = 0; tile < count; ++tile) {
        F32 acc[T][kParts];
        float_tile<Bf16, T>(acc, tiles + tile * tile_bytes, cols, x, x_stride);
        for (int t = 0; t < T; ++t) {
            put_tile(acc[t], y + t * y_stride + tile * 16, rows - tile * 16, add_to);
        }
    }
}

template <bool Bf16>
void float_matmul(const uint8_t* tiles, int64_t count, int64_t cols, int64_t rows, const float* x, int64_t x_stride,
                  int64_t tokens, float* y, int64_t y_stride, bool add_to) {
    int64_t t = 0;
    for (; t + 4 <= tokens; t += 4) {
        float_product<Bf16, 4>(tiles, count, cols, rows, x + t * x_stride, x_stride, y + t * y_stride, y_stride,
                               add_to);
    }
    for (; t < tokens; ++t) {
        float_product<Bf16, 1>(tiles, count, cols, rows, x + t * x_stride, x_stride, y + t * y_stride, y_stride,
                               add_to);
    }
}

void matmul_f(int32_t packing, const uint8_t* tiles, int64_t count, int64_t cols, int64_t rows, const float* x,
              int64_t x_stride, int64_t tokens, float* y, int64_t y_stride, bool add_to) {
    if (static_cast<Packing>(packing) == Packing::bf16) {
        return float_matmul<true>(tiles, count, cols, rows, x, x_stride, tokens, y, y_stride, add_to);
    }
    return float_matmul<false>(tiles, count, cols, rows, x, x_stride, tokens, y, y_stride, add_to);
}

}  // namespace
}  // namespace shoal::SHOAL_ISA
