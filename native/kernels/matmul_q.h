// y = x W^T with W packed in q8, q4 or q4m (packed.h) and x in int8 groups. See ops.h for shapes.
//
// A group is 32 columns: whole-number dot products first, then one multiply-add with the product of both scales. The
// code offsets (128 or 8) cost nothing: the whole-number sum starts at -offset * sum(x) instead of 0.
#pragma once

#include "shoal/packed.h"
#include "simd/common.h"

namespace shoal::SHOAL_ISA {
namespace {

// Vectors in a tile of 16 rows. Loops over them are unrolled four times: wholly where they must become registers, while
// the scalar set's 16 would only make the code ten times as long, and slower.
constexpr int kParts = 16 / kLanes;

template <int T>
struct TileProduct {  // of T tokens
    F32 acc[T][kParts];
};

struct TokenBlocks {  // activations in blocks of L tokens
    const int8_t* codes;
    const float* scales;
    const int32_t* sums;
    int64_t code_stride, scale_stride;  // from block to block
};

template <int L, int T>
SHOAL_INLINE void add_step(I32 (&sum)[T][kParts], I8 codes, int part, const TokenBlocks& x, int64_t step) {
#pragma GCC unroll 12
    for (int t = 0; t < T; ++t) {
        sum[t][part] = dot_codes(sum[t][part], codes, x.codes + t / L * x.code_stride + (step * L + t % L) * 4);
    }
}

template <Packing P, int L, int T>
SHOAL_INLINE void add_group(TileProduct<T>& out, const uint8_t* codes, const uint16_t* scales, int64_t group,
                            const TokenBlocks& x) {
    constexpr int32_t offset = P == Packing::q8 ? kStoredOffset : P == Packing::q4 ? 8 : 0;
    I32 sum[T][kParts];
#pragma GCC unroll 12
    for (int t = 0; t < T; ++t) {
        const int32_t start = offset == 0 ? 0 : -offset * x.sums[t / L * x.scale_stride + group * L + t % L];
#pragma GCC unroll 4
        for (int part = 0; part < kParts; ++part) {
            sum[t][part] = iset1(start);
        }
    }
    if constexpr (P == Packing::q8) {
#pragma GCC unroll 8
        for (int step = 0; step < 8; ++step) {
#pragma GCC unroll 4
            for (int part = 0; part < kParts; ++part) {
                add_step<L, T>(sum, stored_codes(codes + step * 64 + part * kBytes), part, x, group * 8 + step);
            }
        }
    } else {
#pragma GCC unroll 4
        for (int step = 0; step < 4; ++step) {
#pragma GCC unroll 4
            for (int part = 0; part < kParts; ++part) {
                const I8 both = load_i8(reinterpret_cast<const int8_t*>(codes + step * 64 + part * kBytes));
                add_step<L, T>(sum, low_nibbles(both), part, x, group * 8 + step);
                add_step<L, T>(sum, high_nibbles(both), part, x, group * 8 + step + 4);
            }
        }
    }
#pragma GCC unroll 4
    for (int part = 0; part < kParts; ++part) {
        const F32 scale = load_f16(scales + part * kLanes);
#pragma GCC unroll 12
        for (int t = 0; t < T; ++t) {
            const int64_t at = t / L * x.scale_stride + group * L + t % L;
            const F32 both = mul(scale, set1(x.scales[at]));
            out.acc[t][part] = fma(to_f32(sum[t][part]), both, out.acc[t][part]);
            if constexpr (P == Packing::q4m) {
                const float x_sum = x.scales[at] * static_cast<float>(x.sums[at]);
                out.acc[t][part] = fma(load_f16(scales + 32 + part * kLanes), set1(x_sum), out.acc[t][part]);
            }
        }
    }
}

template <Packing P, int L, int T>
SHOAL_INLINE void tile_product(TileProduct<T>& out, const uint8_t* tile, int64_t blocks, const TokenBlocks& x) {
    constexpr int64_t bytes = static_cast<int64_t>(block_bytes(P));
    constexpr int64_t codes_at = P == Packing::q4m ? 128 : 64;
    constexpr int64_t group_bytes = P == Packing::q8 ? 512 : 256;
    // Weights come from memory in the first pass over them. More than eight tokens leave the hardware's guess behind
    // and are fastest when the second cache fetches ahead; fewer are without (measured with both cores at work).
    constexpr int64_t ahead = T > 8 ? 4352 : 0;
#pragma GCC unroll 12
    for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
        for (int part = 0; part < kParts; ++part) {
            out.acc[t][part] = zero();
        }
    }
    for (int64_t block = 0; block < blocks; ++block, tile += bytes) {
        if constexpr (ahead > 0) {
            for (int64_t line = 0; line < bytes; line += 64) {
                __builtin_prefetch(tile + ahead + line, 0, 2);
            }
        }
        const auto* scales = reinterpret_cast<const uint16_t*>(tile);
        add_group<P, L, T>(out, tile + codes_at, scales, block * 2, x);
        add_group<P, L, T>(out, tile + codes_at + group_bytes, scales + 16, block * 2 + 1, x);
    }
}

// The first `rows` of a tile's 16 results to y, or onto it.
SHOAL_INLINE void put_tile(const F32 (&acc)[kParts], float* y, int64_t rows, bool add_to) {
#pragma GCC unroll 4
    for (int part = 0; part < kParts; ++part) {
        const int64_t left = rows - part * kLanes;
        float* at = y + part * kLanes;
        if (left >= kLanes) {
            store(at, add_to ? add(load(at), acc[part]) : acc[part]);
        } else if (left > 0) {
            const int n = static_cast<int>(left);
            store_n(at, add_to ? add(load_n(at, n), acc[part]) : acc[part], n);
        }
    }
}

template <Packing P, int L, int T>
void product(const uint8_t* tiles, int64_t count, int64_t blocks, int64_t rows, const TokenBlocks& x, float* y,
             int64_t y_stride, bool add_to) {
    const int64_t tile_bytes = blocks * static_cast<int64_t>(block_bytes(P));
    for (int64_t tile = 0; tile < count; ++tile) {
        TileProduct<T> out;
        tile_product<P, L, T>(out, tiles + tile * tile_bytes, blocks, x);
#pragma GCC unroll 12
        for (int t = 0; t < T; ++t) {
            put_tile(out.acc[t], y + t * y_stride + tile * 16, rows - tile * 16, add_to);
        }
    }
}

// Just as many tokens as there are, up to T: an expert's few seldom fill a block.
template <Packing P, int L, int T>
SHOAL_INLINE void product_of(int64_t tokens, const uint8_t* tiles, int64_t count, int64_t blocks, int64_t rows,
                             const TokenBlocks& x, float* y, int64_t y_stride, bool add_to) {
    if constexpr (T > 1) {
        if (tokens < T) {
            return product_of<P, L, T - 1>(tokens, tiles, count, blocks, rows, x, y, y_stride, add_to);
        }
    }
    product<P, L, T>(tiles, count, blocks, rows, x, y, y_stride, add_to);
}

template <Packing P, int L>
void matmul_packing(const uint8_t* tiles, int64_t count, int64_t blocks, int64_t rows, TokenBlocks x, int64_t tokens,
                    float* y, int64_t y_stride, bool add_to) {
    constexpr int64_t most = L == 1 ? 2 : 4 * kMaxTokenBlocks;  // plain rows in pairs, which read the weights once
    for (; tokens > 0; tokens -= most) {
        product_of<P, L, most>(tokens, tiles, count, blocks, rows, x, y, y_stride, add_to);
        x.codes += most / L * x.code_stride, x.scales += most / L * x.scale_stride, x.sums += most / L * x.scale_stride;
        y += most * y_stride;
    }
}

template <Packing P>
void matmul_lanes(const uint8_t* tiles, int64_t count, int64_t blocks, int64_t rows, const TokenBlocks& x,
                  int64_t tokens, int64_t lanes, float* y, int64_t y_stride, bool add_to) {
    if (lanes == 1) {
        matmul_packing<P, 1>(tiles, count, blocks, rows, x, tokens, y, y_stride, add_to);
    } else {
        matmul_packing<P, 4>(tiles, count, blocks, rows, x, tokens, y, y_stride, add_to);
    }
}

void matmul_q(int32_t packing, const uint8_t* tiles, int64_t count, int64_t cols, int64_t rows, const QuantRows* x,
              int64_t tokens, int64_t lanes, float* y, int64_t y_stride, bool add_to) {
    const int64_t blocks = (cols + 63) / 64;
    const TokenBlocks in{x->codes, x->scales, x->sums, blocks * 64 * lanes, blocks * 2 * lanes};
    switch (static_cast<Packing>(packing)) {
        case Packing::q8:
            return matmul_lanes<Packing::q8>(tiles, count, blocks, rows, in, tokens, lanes, y, y_stride, add_to);
        case Packing::q4:
            return matmul_lanes<Packing::q4>(tiles, count, blocks, rows, in, tokens, lanes, y, y_stride, add_to);
        default:
            return matmul_lanes<Packing::q4m>(tiles, count, blocks, rows, in, tokens, lanes, y, y_stride, add_to);
    }
}

}  // namespace
}  // namespace shoal::SHOAL_ISA
