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

template <Packing P, int L, int NB>
struct TileProduct {
    F32 acc[NB * L][kParts];
};

struct TokenBlocks {  // activations of NB blocks of L tokens
    const int8_t* codes;
    const float* scales;
    const int32_t* sums;
    int64_t code_stride, scale_stride;  // from block to block
};

template <int L, int NB>
SHOAL_INLINE void add_step(I32 (&sum)[NB * L][kParts], I8 codes, int part, const TokenBlocks& x, int64_t step) {
#pragma GCC unroll 3
    for (int nb = 0; nb < NB; ++nb) {
#pragma GCC unroll 4
        for (int t = 0; t < L; ++t) {
            sum[nb * L + t][part] =
                dot_codes(sum[nb * L + t][part], codes, x.codes + nb * x.code_stride + (step * L + t) * 4);
        }
    }
}

template <Packing P, int L, int NB>
SHOAL_INLINE void add_group(TileProduct<P, L, NB>& out, const uint8_t* codes, const uint16_t* scales, int64_t group,
                            const TokenBlocks& x) {
    constexpr int32_t offset = P == Packing::q8 ? kStoredOffset : P == Packing::q4 ? 8 : 0;
    I32 sum[NB * L][kParts];
#pragma GCC unroll 12
    for (int t = 0; t < NB * L; ++t) {
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
                add_step<L, NB>(sum, stored_codes(codes + step * 64 + part * kBytes), part, x, group * 8 + step);
            }
        }
    } else {
#pragma GCC unroll 4
        for (int step = 0; step < 4; ++step) {
#pragma GCC unroll 4
            for (int part = 0; part < kParts; ++part) {
                const I8 both = load_i8(reinterpret_cast<const int8_t*>(codes + step * 64 + part * kBytes));
                add_step<L, NB>(sum, low_nibbles(both), part, x, group * 8 + step);
                add_step<L, NB>(sum, high_nibbles(both), part, x, group * 8 + step + 4);
            }
        }
    }
#pragma GCC unroll 4
    for (int part = 0; part < kParts; ++part) {
        const F32 scale = load_f16(scales + part * kLanes);
#pragma GCC unroll 12
        for (int t = 0; t < NB * L; ++t) {
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

template <Packing P, int L, int NB>
SHOAL_INLINE void tile_product(TileProduct<P, L, NB>& out, const uint8_t* tile, int64_t blocks, const TokenBlocks& x) {
    constexpr int64_t bytes = static_cast<int64_t>(block_bytes(P));
    constexpr int64_t codes_at = P == Packing::q4m ? 128 : 64;
    constexpr int64_t group_bytes = P == Packing::q8 ? 512 : 256;
    constexpr int64_t ahead = NB * L == 1 ? kPrefetchBytes : L == 4 && NB > 1 ? 2304 : 0;
#pragma GCC unroll 12
    for (int t = 0; t < NB * L; ++t) {
#pragma GCC unroll 4
        for (int part = 0; part < kParts; ++part) {
            out.acc[t][part] = zero();
        }
    }
    for (int64_t block = 0; block < blocks; ++block, tile += bytes) {
        // Weights come from memory, with many tokens in the first pass over them: read ahead of the hardware's guess.
        // Four tokens, which wait for memory but have work to do, are faster without (measured).
        if constexpr (ahead > 0) {
            for (int64_t line = 0; line < bytes; line += 64) {
                __builtin_prefetch(tile + ahead + line);
            }
        }
        const auto* scales = reinterpret_cast<const uint16_t*>(tile);
        add_group<P, L, NB>(out, tile + codes_at, scales, block * 2, x);
        add_group<P, L, NB>(out, tile + codes_at + group_bytes, scales + 16, block * 2 + 1, x);
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

template <Packing P, int L, int NB>
void product(const uint8_t* tiles, int64_t count, int64_t blocks, int64_t rows, const TokenBlocks& x, int64_t tokens,
             float* y, int64_t y_stride, bool add_to) {
    const int64_t tile_bytes = blocks * static_cast<int64_t>(block_bytes(P));
    for (int64_t tile = 0; tile < count; ++tile) {
        TileProduct<P, L, NB> out;
        tile_product<P, L, NB>(out, tiles + tile * tile_bytes, blocks, x);
#pragma GCC unroll 12
        for (int t = 0; t < NB * L; ++t) {
            if (t < tokens) {
                put_tile(out.acc[t], y + t * y_stride + tile * 16, rows - tile * 16, add_to);
            }
        }
    }
}

template <Packing P>
void matmul_packing(const uint8_t* tiles, int64_t count, int64_t blocks, int64_t rows, TokenBlocks x, int64_t tokens,
                    int64_t lanes, float* y, int64_t y_stride, bool add_to) {
    if (lanes == 1) {
        for (; tokens >= 2; tokens -= 2) {  // plain rows in pairs, which read the weights once
            product<P, 1, 2>(tiles, count, blocks, rows, x, 2, y, y_stride, add_to);
            x.codes += 2 * x.code_stride, x.scales += 2 * x.scale_stride, x.sums += 2 * x.scale_stride;
            y += 2 * y_stride;
        }
        if (tokens == 1) {
            product<P, 1, 1>(tiles, count, blocks, rows, x, 1, y, y_stride, add_to);
        }
        return;
    }
    while (tokens > 0) {
        int64_t done = 4;
        if (kMaxTokenBlocks >= 3 && tokens > 8) {
            product<P, 4, kMaxTokenBlocks>(tiles, count, blocks, rows, x, tokens, y, y_stride, add_to);
            done = 4 * kMaxTokenBlocks;
        } else if (kMaxTokenBlocks >= 2 && tokens > 4) {
            product<P, 4, kMaxTokenBlocks >= 2 ? 2 : 1>(tiles, count, blocks, rows, x, tokens, y, y_stride, add_to);
            done = 8;
        } else {
            product<P, 4, 1>(tiles, count, blocks, rows, x, tokens, y, y_stride, add_to);
        }
        tokens -= done;
        y += done * y_stride;
        x.codes += done / 4 * x.code_stride, x.scales += done / 4 * x.scale_stride, x.sums += done / 4 * x.scale_stride;
    }
}

void matmul_q(int32_t packing, const uint8_t* tiles, int64_t count, int64_t cols, int64_t rows, const QuantRows* x,
              int64_t tokens, int64_t lanes, float* y, int64_t y_stride, bool add_to) {
    const int64_t blocks = (cols + 63) / 64;
    const TokenBlocks in{x->codes, x->scales, x->sums, blocks * 64 * lanes, blocks * 2 * lanes};
    switch (static_cast<Packing>(packing)) {
        case Packing::q8:
            return matmul_packing<Packing::q8>(tiles, count, blocks, rows, in, tokens, lanes, y, y_stride, add_to);
        case Packing::q4:
            return matmul_packing<Packing::q4>(tiles, count, blocks, rows, in, tokens, lanes, y, y_stride, add_to);
        default:
            return matmul_packing<Packing::q4m>(tiles, count, blocks, rows, in, tokens, lanes, y, y_stride, add_to);
    }
}

}  // namespace
}  // namespace shoal::SHOAL_ISA
