// Attention of up to 16 queries over one run of cached keys and values. See ops.h for shapes.
//
// Queries lie in the 16 lanes of a tile, so a key element is broadcast once for all of them; a value row meets all
// queries while it is in registers. For MLA in absorbed form the values are the head of the key row itself (the
// latent), and the cache is read twice from the nearest cache level and once from memory. Keys are walked in blocks of
// 64 with the running maximum of online softmax (arXiv 1805.02867).
#pragma once

#include "kernels/matmul_q.h"
#include "simd/common.h"
#include "simd/math.h"

namespace shoal::SHOAL_ISA {
namespace {

constexpr int kKeyBlock = 64;
constexpr float kMasked = -1e30f;  // finite, so that a fully masked lane stays free of NaN

template <bool Bf16>
struct ElementOf {
    using type = float;
};
template <>
struct ElementOf<true> {
    using type = uint16_t;
};
template <bool Bf16>
using CacheElement = typename ElementOf<Bf16>::type;

// scores[key][16] of `n` <= 8 keys that start at `keys`.
template <bool Bf16, int N>
SHOAL_INLINE void score_keys(const void* queries, const CacheElement<Bf16>* keys, int64_t key_stride, int64_t width,
                             float* scores) {
    F32 acc[N][kParts];
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
#pragma GCC unroll 4
        for (int part = 0; part < kParts; ++part) {
            acc[i][part] = zero();
        }
    }
    constexpr int step = Bf16 ? 2 : 1;
    for (int64_t k = 0; k < width; k += step) {
#pragma GCC unroll 4
        for (int part = 0; part < kParts; ++part) {
            if constexpr (Bf16) {
                const Pairs q = load_pairs(static_cast<const uint16_t*>(queries) + k * 16 + part * kLanes * 2);
#pragma GCC unroll 8
                for (int i = 0; i < N; ++i) {
                    acc[i][part] = dot_pair(acc[i][part], q, keys + i * key_stride + k);
                }
            } else {
                const F32 q = load(static_cast<const float*>(queries) + k * 16 + part * kLanes);
#pragma GCC unroll 8
                for (int i = 0; i < N; ++i) {
                    acc[i][part] = fma(q, set1(keys[i * key_stride + k]), acc[i][part]);
                }
            }
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
#pragma GCC unroll 4
        for (int part = 0; part < kParts; ++part) {
            store(scores + i * 16 + part * kLanes, acc[i][part]);
        }
    }
}

// Scores of one block to weights: masks, moves the running maximum, returns each lane's rescale factor in `shrink`.
SHOAL_INLINE void weigh(float* scores, int64_t keys, int64_t first_key, const int32_t* last_key, float* top,
                        float* total, float* shrink) {
#pragma GCC unroll 4
    for (int part = 0; part < kParts; ++part) {
        float limits[kLanes];
        for (int lane = 0; lane < kLanes; ++lane) {
            limits[lane] = static_cast<float>(last_key[part * kLanes + lane] - first_key) + 0.5f;
        }
        const F32 limit = load(limits), old_top = load(top + part * kLanes), masked = set1(kMasked);
        F32 new_top = old_top;
        for (int64_t i = 0; i < keys; ++i) {
            float* at = scores + i * 16 + part * kLanes;
            const F32 score = select_lt(set1(static_cast<float>(i)), limit, load(at), masked);
            store(at, score);
            new_top = max(new_top, score);
        }
        const F32 factor = exp(sub(old_top, new_top));
        F32 sum_now = mul(load(total + part * kLanes), factor);
        for (int64_t i = 0; i < keys; ++i) {
            float* at = scores + i * 16 + part * kLanes;
            const F32 weight = exp(sub(load(at), new_top));
            store(at, weight);
            sum_now = add(sum_now, weight);
        }
        store(top + part * kLanes, new_top);
        store(total + part * kLanes, sum_now);
        store(shrink + part * kLanes, factor);
    }
}

// out[q][width] = out * shrink + sum over keys of weight * value, for Q queries from `first` on.
template <bool Bf16, int Q>
void add_values(const void* weights, int64_t keys, const CacheElement<Bf16>* values, int64_t value_stride,
                int64_t width, int first, const float* shrink, float* out) {
    for (int64_t c = 0; c < width; c += kLanes) {
        const int n = width - c < kLanes ? static_cast<int>(width - c) : kLanes;
        F32 acc[Q];
#pragma GCC unroll 16
        for (int q = 0; q < Q; ++q) {
            acc[q] = mul(load_n(out + (first + q) * width + c, n), set1(shrink[first + q]));
        }
        if constexpr (Bf16) {
            for (int64_t i = 0; i < keys; i += 2) {
                const CacheElement<Bf16>* row = values + i * value_stride + c;
                const Pairs v = zip_rows(row, i + 1 < keys ? row + value_stride : row, n);
                const auto* w = static_cast<const uint16_t*>(weights) + (i * 16 + first * 2);
#pragma GCC unroll 16
                for (int q = 0; q < Q; ++q) {
                    acc[q] = dot_pair(acc[q], v, w + q * 2);
                }
            }
        } else {
            for (int64_t i = 0; i < keys; ++i) {
                const F32 v = load_n(values + i * value_stride + c, n);
                const auto* w = static_cast<const float*>(weights) + i * 16 + first;
#pragma GCC unroll 16
                for (int q = 0; q < Q; ++q) {
                    acc[q] = fma(v, set1(w[q]), acc[q]);
                }
            }
        }
#pragma GCC unroll 16
        for (int q = 0; q < Q; ++q) {
            store_n(out + (first + q) * width + c, acc[q], n);
        }
    }
}

// Weights [key][16] in f32 to pairs of neighbouring keys [key / 2][16][2] in bf16, in place; an odd last key gets a
// zero.
SHOAL_INLINE void pair_weights(const float* weights, int64_t keys, uint16_t* pairs) {
    for (int64_t i = 0; i < keys; i += 2) {
        alignas(64) uint16_t even[16], odd[16];
#pragma GCC unroll 4
        for (int part = 0; part < kParts; ++part) {
            store_bf16(even + part * kLanes, load(weights + i * 16 + part * kLanes));
            store_bf16(odd + part * kLanes, i + 1 < keys ? load(weights + (i + 1) * 16 + part * kLanes) : zero());
        }
        for (int lane = 0; lane < 16; ++lane) {
            pairs[i * 16 + lane * 2] = even[lane];
            pairs[i * 16 + lane * 2 + 1] = odd[lane];
        }
    }
}

template <bool Bf16>
void attend_typed(const AttendRun& run, float* top, float* total, float* out) {
    using Element = CacheElement<Bf16>;
    alignas(64) float scores[kKeyBlock * 16];
    alignas(64) uint16_t pairs[kKeyBlock * 16];
    alignas(64) float shrink[16];
    const auto* keys = static_cast<const Element*>(run.keys);
    const auto* values = static_cast<const Element*>(run.values);
    int64_t i = 0;
    for (; i + 8 <= run.num_keys; i += 8) {
        score_keys<Bf16, 8>(run.queries, keys + i * run.key_stride, run.key_stride, run.key_width, scores + i * 16);
    }
    for (; i < run.num_keys; ++i) {
        score_keys<Bf16, 1>(run.queries, keys + i * run.key_stride, run.key_stride, run.key_width, scores + i * 16);
    }
    weigh(scores, run.num_keys, run.first_key, run.last_key, top, total, shrink);
    if constexpr (Bf16) {
        pair_weights(scores, run.num_keys, pairs);
    }
    const void* weights = Bf16 ? static_cast<const void*>(pairs) : static_cast<const void*>(scores);
    int q = 0;
    for (; q + kQueryBlock <= run.num_queries; q += kQueryBlock) {
        add_values<Bf16, kQueryBlock>(weights, run.num_keys, values, run.value_stride, run.value_width, q, shrink, out);
    }
    for (; q + 4 <= run.num_queries; q += 4) {
        add_values<Bf16, 4>(weights, run.num_keys, values, run.value_stride, run.value_width, q, shrink, out);
    }
    for (; q < run.num_queries; ++q) {
        add_values<Bf16, 1>(weights, run.num_keys, values, run.value_stride, run.value_width, q, shrink, out);
    }
}

void attend(const AttendRun* run, float* top, float* total, float* out) {
    return run->bf16 ? attend_typed<true>(*run, top, total, out) : attend_typed<false>(*run, top, total, out);
}

}  // namespace
}  // namespace shoal::SHOAL_ISA
