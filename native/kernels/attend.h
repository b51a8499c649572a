// Attention of up to 16 queries over one run of cached keys and values. See ops.h for shapes.
//
// Queries lie in the 16 lanes of a tile, so a key element is broadcast once for all of them, or, up to eight in bf16,
// in every other lane, where two pairs of elements are met at once; a value row meets eight queries while it is in
// registers. For MLA in absorbed form the values are the head of the key row itself (the latent), and the cache is read
// twice from the nearest cache level and once from memory. Keys are walked in blocks of 64 with the running maximum of
// online softmax (arXiv 1805.02867).
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

// The rows of N keys from `keys` on; those beyond the last of `count` repeat it.
template <class T, int N>
SHOAL_INLINE void key_rows(const T* (&rows)[N], const T* keys, int64_t stride, int64_t count) {
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
        rows[i] = keys + (i < count ? i : count - 1) * stride;
    }
}

// scores[N keys][16]. Products with even and with odd pairs of a key's elements add up apart, as in score_eight.
template <int N>
SHOAL_INLINE void score_pairs(const uint16_t* queries, const uint16_t* (&keys)[N], int64_t width, float* scores) {
    F32 even[N][kParts], odd[N][kParts];
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
#pragma GCC unroll 4
        for (int part = 0; part < kParts; ++part) {
            even[i][part] = odd[i][part] = zero();
        }
    }
    for (int64_t k = 0; k < width; k += 4) {
#pragma GCC unroll 4
        for (int part = 0; part < kParts; ++part) {
            const uint16_t* at = queries + k * 16 + part * kLanes * 2;
            const Pairs first = load_pairs(at);
#pragma GCC unroll 8
            for (int i = 0; i < N; ++i) {
                even[i][part] = dot_pair(even[i][part], first, keys[i] + k);
            }
            if (k + 2 == width) continue;
            const Pairs second = load_pairs(at + 32);
#pragma GCC unroll 8
            for (int i = 0; i < N; ++i) {
                odd[i][part] = dot_pair(odd[i][part], second, keys[i] + k + 2);
            }
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
#pragma GCC unroll 4
        for (int part = 0; part < kParts; ++part) {
            store(scores + i * 16 + part * kLanes, add(even[i][part], odd[i][part]));
        }
    }
}

// The same for at most eight queries, each with two pairs of elements side by side; lanes 8 to 15 are left alone.
template <int N>
SHOAL_INLINE void score_eight(const uint16_t* queries, const uint16_t* (&keys)[N], int64_t width, float* scores) {
    F32 acc[N][kParts];
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
#pragma GCC unroll 4
        for (int part = 0; part < kParts; ++part) {
            acc[i][part] = zero();
        }
    }
    for (int64_t k = 0; k < width; k += 4) {
#pragma GCC unroll 4
        for (int part = 0; part < kParts; ++part) {
            const Pairs q = load_pairs(queries + k * 8 + part * kLanes * 2);
#pragma GCC unroll 8
            for (int i = 0; i < N; ++i) {
                acc[i][part] = dot_quad(acc[i][part], q, keys[i] + k, part);
            }
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
        alignas(64) float both[16];
#pragma GCC unroll 4
        for (int part = 0; part < kParts; ++part) {
            store(both + part * kLanes, acc[i][part]);
        }
#pragma GCC unroll 8
        for (int q = 0; q < 8; ++q) {
            scores[i * 16 + q] = both[2 * q] + both[2 * q + 1];
        }
    }
}

// scores[N keys][16] in f32.
template <int N>
SHOAL_INLINE void score_floats(const float* queries, const float* (&keys)[N], int64_t width, float* scores) {
    F32 acc[N][kParts];
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
#pragma GCC unroll 4
        for (int part = 0; part < kParts; ++part) {
            acc[i][part] = zero();
        }
    }
    for (int64_t k = 0; k < width; ++k) {
#pragma GCC unroll 4
        for (int part = 0; part < kParts; ++part) {
            const F32 q = load(queries + k * 16 + part * kLanes);
#pragma GCC unroll 8
            for (int i = 0; i < N; ++i) {
                acc[i][part] = fma(q, set1(keys[i][k]), acc[i][part]);
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

// scores[key][16] of all keys of the block, N at a time; those of the last few fill up its 64 rows.
template <bool Bf16, int Lanes>
SHOAL_INLINE void score_block(const AttendRun& run, float* scores) {
    using Element = CacheElement<Bf16>;
    constexpr int N = kLanes == 16 || !Bf16 ? 8 : Lanes == 8 ? 4 : 2;  // keys whose sums the registers hold
    const auto* keys = static_cast<const Element*>(run.keys);
    const auto* queries = static_cast<const Element*>(run.queries);
    for (int64_t i = 0; i < run.num_keys; i += N) {
        const Element* rows[N];
        key_rows(rows, keys + i * run.key_stride, run.key_stride, run.num_keys - i);
        if constexpr (!Bf16) {
            score_floats<N>(queries, rows, run.key_width, scores + i * 16);
        } else if constexpr (Lanes == 8) {
            score_eight<N>(queries, rows, run.key_width, scores + i * 16);
        } else {
            score_pairs<N>(queries, rows, run.key_width, scores + i * 16);
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

// out[q][columns] = out * shrink + sum over keys of weight * value, for Q queries from `first` on. bf16: pairs of keys
// at a time, kZipped vectors of columns or, `n` of them, one.
template <int Q, int C>
SHOAL_INLINE void add_pairs(const uint16_t* weights, int64_t keys, const uint16_t* values, int64_t value_stride,
                            int64_t width, int n, const float* shrink, float* out) {
    F32 acc[Q][C];
#pragma GCC unroll 16
    for (int q = 0; q < Q; ++q) {
#pragma GCC unroll 2
        for (int c = 0; c < C; ++c) {
            acc[q][c] = mul(load_n(out + q * width + c * kLanes, n), set1(shrink[q]));
        }
    }
    for (int64_t i = 0; i < keys; i += 2) {
        const uint16_t* row = values + i * value_stride;
        const uint16_t* next = i + 1 < keys ? row + value_stride : row;
        Pairs v[C];
        if constexpr (C > 1) {
            zip_wide(row, next, v);
        } else {
            v[0] = zip_rows(row, next, n);
        }
#pragma GCC unroll 16
        for (int q = 0; q < Q; ++q) {
#pragma GCC unroll 2
            for (int c = 0; c < C; ++c) {
                acc[q][c] = dot_pair(acc[q][c], v[c], weights + i * 16 + q * 2);
            }
        }
    }
#pragma GCC unroll 16
    for (int q = 0; q < Q; ++q) {
#pragma GCC unroll 2
        for (int c = 0; c < C; ++c) {
            store_n(out + q * width + c * kLanes, acc[q][c], n);
        }
    }
}

template <int Q>
SHOAL_INLINE void add_floats(const float* weights, int64_t keys, const float* values, int64_t value_stride,
                             int64_t width, int n, const float* shrink, float* out) {
    F32 acc[Q];
#pragma GCC unroll 16
    for (int q = 0; q < Q; ++q) {
        acc[q] = mul(load_n(out + q * width, n), set1(shrink[q]));
    }
    for (int64_t i = 0; i < keys; ++i) {
        const F32 v = load_n(values + i * value_stride, n);
#pragma GCC unroll 16
        for (int q = 0; q < Q; ++q) {
            acc[q] = fma(v, set1(weights[i * 16 + q]), acc[q]);
        }
    }
#pragma GCC unroll 16
    for (int q = 0; q < Q; ++q) {
        store_n(out + q * width, acc[q], n);
    }
}

template <bool Bf16, int Q>
void add_values(const void* weights, const AttendRun& run, int first, const float* shrink, float* out) {
    using Element = CacheElement<Bf16>;
    const int64_t width = run.value_width;
    const auto* values = static_cast<const Element*>(run.values);
    const auto* w = static_cast<const Element*>(weights) + first * (Bf16 ? 2 : 1);
    out += first * width;
    shrink += first;
    int64_t c = 0;
    if constexpr (Bf16 && kZipped > 1) {
        for (; c + kZipped * kLanes <= width; c += kZipped * kLanes) {
            add_pairs<Q, kZipped>(w, run.num_keys, values + c, run.value_stride, width, kLanes, shrink, out + c);
        }
    }
    for (; c < width; c += kLanes) {
        const int n = width - c < kLanes ? static_cast<int>(width - c) : kLanes;
        if constexpr (Bf16) {
            add_pairs<Q, 1>(w, run.num_keys, values + c, run.value_stride, width, n, shrink, out + c);
        } else {
            add_floats<Q>(w, run.num_keys, values + c, run.value_stride, width, n, shrink, out + c);
        }
    }
}

// Weights [key][16] in f32 to pairs of neighbouring keys [key / 2][16][2] in bf16, in place; an odd last key gets a
// zero.
SHOAL_INLINE void pair_weights(const float* weights, int64_t keys, uint16_t* pairs) {
    for (int64_t i = 0; i < keys; i += 2) {
#pragma GCC unroll 4
        for (int part = 0; part < kParts; ++part) {
            const float* at = weights + i * 16 + part * kLanes;
            store_zipped(pairs + i * 16 + part * kLanes * 2, load(at), i + 1 < keys ? load(at + 16) : zero());
        }
    }
}

template <bool Bf16>
void attend_typed(const AttendRun& run, float* top, float* total, float* out) {
    alignas(64) float scores[kKeyBlock * 16];
    alignas(64) uint16_t pairs[kKeyBlock * 16];
    alignas(64) float shrink[16];
    if (Bf16 && run.lanes == 8) {
        score_block<Bf16, 8>(run, scores);
    } else {
        score_block<Bf16, 16>(run, scores);
    }
    weigh(scores, run.num_keys, run.first_key, run.last_key, top, total, shrink);
    if constexpr (Bf16) {
        pair_weights(scores, run.num_keys, pairs);
    }
    const void* weights = Bf16 ? static_cast<const void*>(pairs) : static_cast<const void*>(scores);
    int q = 0;
    for (; q + kQueryBlock <= run.num_queries; q += kQueryBlock) {
        add_values<Bf16, kQueryBlock>(weights, run, q, shrink, out);
    }
    for (; q + 4 <= run.num_queries; q += 4) {
        add_values<Bf16, 4>(weights, run, q, shrink, out);
    }
    for (; q < run.num_queries; ++q) {
        add_values<Bf16, 1>(weights, run, q, shrink, out);
    }
}

void attend(const AttendRun* run, float* top, float* total, float* out) {
    if (run->num_keys == 0) {
        return;
    }
    return run->bf16 ? attend_typed<true>(*run, top, total, out) : attend_typed<false>(*run, top, total, out);
}

}  // namespace
}  // namespace shoal::SHOAL_ISA
