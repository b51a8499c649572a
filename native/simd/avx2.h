// x86-64-v3: eight lanes, FMA and F16C. See common.h for the contract.
#pragma once

#include <immintrin.h>

#include "simd/common.h"

#define SHOAL_ISA avx2

namespace shoal::avx2 {
namespace {

using F32 = __m256;
using I32 = __m256i;
using I8 = __m256i;
constexpr int kLanes = 8;
constexpr int kBytes = 32;

alignas(32) constexpr int32_t kTailMask[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};

SHOAL_INLINE __m256i first(int n) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kTailMask + kLanes - n));
}

SHOAL_INLINE F32 zero() { return _mm256_setzero_ps(); }
SHOAL_INLINE F32 set1(float x) { return _mm256_set1_ps(x); }
SHOAL_INLINE F32 load(const float* p) { return _mm256_loadu_ps(p); }
SHOAL_INLINE F32 load_n(const float* p, int n) { return _mm256_maskload_ps(p, first(n)); }
SHOAL_INLINE void store(float* p, F32 v) { _mm256_storeu_ps(p, v); }
SHOAL_INLINE void store_n(float* p, F32 v, int n) { _mm256_maskstore_ps(p, first(n), v); }

SHOAL_INLINE F32 add(F32 a, F32 b) { return _mm256_add_ps(a, b); }
SHOAL_INLINE F32 sub(F32 a, F32 b) { return _mm256_sub_ps(a, b); }
SHOAL_INLINE F32 mul(F32 a, F32 b) { return _mm256_mul_ps(a, b); }
SHOAL_INLINE F32 div(F32 a, F32 b) { return _mm256_div_ps(a, b); }
SHOAL_INLINE F32 fma(F32 a, F32 b, F32 c) { return _mm256_fmadd_ps(a, b, c); }
SHOAL_INLINE F32 max(F32 a, F32 b) { return _mm256_max_ps(a, b); }
SHOAL_INLINE F32 select_lt(F32 a, F32 b, F32 yes, F32 no) {
    return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}

SHOAL_INLINE float sum(F32 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
SHOAL_INLINE float max_of(F32 v) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

SHOAL_INLINE F32 pow2(F32 n) {
    const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
}

SHOAL_INLINE F32 widen_bf16(__m128i v) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16)); }
SHOAL_INLINE __m128i narrow_bf16(F32 v) {
    const __m256i u = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));  // a NaN stays one
    const __m256 is_nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
    const __m256 chosen = _mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_castsi256_ps(quiet), is_nan);
    const __m256i high = _mm256_srli_epi32(_mm256_castps_si256(chosen), 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x88);
    return _mm256_castsi256_si128(packed);
}
SHOAL_INLINE F32 load_bf16(const uint16_t* p) {
    return widen_bf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
SHOAL_INLINE F32 load_bf16_n(const uint16_t* p, int n) {
    __m128i v = _mm_setzero_si128();
    __builtin_memcpy(&v, p, static_cast<unsigned>(n) * 2);
    return widen_bf16(v);
}
SHOAL_INLINE void store_bf16(uint16_t* p, F32 v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_bf16(v)); }
SHOAL_INLINE void store_bf16_n(uint16_t* p, F32 v, int n) {
    const __m128i narrow = narrow_bf16(v);
    __builtin_memcpy(static_cast<void*>(p), &narrow, static_cast<unsigned>(n) * 2);
}
SHOAL_INLINE float f16_to_f32(uint16_t h) { return _cvtsh_ss(h); }

SHOAL_INLINE F32 dot_bf16(F32 acc, const uint16_t* a, const uint16_t* b) {
    acc = fma(load_bf16(a), load_bf16(b), acc);
    return fma(load_bf16(a + kLanes), load_bf16(b + kLanes), acc);
}

SHOAL_INLINE I8 load_i8(const int8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
SHOAL_INLINE I32 izero() { return _mm256_setzero_si256(); }
SHOAL_INLINE I32 dot_i8(I32 acc, I8 a, I8 b) {
    // |a| * (b with the sign of a): unsigned by signed. Two products reach 2 * 128 * 127, which fits 16 bits.
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(a), _mm256_sign_epi8(b, a));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
SHOAL_INLINE int32_t isum(I32 v) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xB1)));
}
SHOAL_INLINE F32 to_f32(I32 v) { return _mm256_cvtepi32_ps(v); }

constexpr int kMaxTokenBlocks = 1;
constexpr int kQueryBlock = 8;
constexpr int32_t kStoredOffset = 0;

SHOAL_INLINE I32 iset1(int32_t x) { return _mm256_set1_epi32(x); }
SHOAL_INLINE I8 stored_codes(const uint8_t* p) {
    return _mm256_xor_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), _mm256_set1_epi8(-128));
}
SHOAL_INLINE I8 low_nibbles(I8 v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
SHOAL_INLINE I8 high_nibbles(I8 v) { return _mm256_and_si256(_mm256_srli_epi16(v, 4), _mm256_set1_epi8(15)); }
SHOAL_INLINE I32 dot_codes(I32 acc, I8 w, const int8_t* x4) {
    int32_t four;
    __builtin_memcpy(&four, x4, 4);
    return dot_i8(acc, w, _mm256_set1_epi32(four));
}
SHOAL_INLINE I32 round_i32(F32 v) { return _mm256_cvtps_epi32(v); }
SHOAL_INLINE void store_codes(int8_t* p, I32 v) {
    const __m256i halves = _mm256_permute4x64_epi64(_mm256_packs_epi32(v, v), 0x08);
    const __m128i low = _mm256_castsi256_si128(halves);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(low, low));
}
SHOAL_INLINE I32 iadd(I32 a, I32 b) { return _mm256_add_epi32(a, b); }
SHOAL_INLINE I32 load_codes(const int8_t* p) {
    return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
SHOAL_INLINE F32 load_f16(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

// bf16 products without an instruction for them: the two halves of every pair as f32, two multiply-adds.
struct Pairs {
    F32 even, odd;
};
SHOAL_INLINE F32 dot_pair(F32 acc, const Pairs& w, const uint16_t* pair) {
    const uint32_t low = static_cast<uint32_t>(pair[0]) << 16, high = static_cast<uint32_t>(pair[1]) << 16;
    acc = fma(w.even, set1(__builtin_bit_cast(float, low)), acc);
    return fma(w.odd, set1(__builtin_bit_cast(float, high)), acc);
}
SHOAL_INLINE Pairs zip_rows(const uint16_t* a, const uint16_t* b, int n) {
    return n == kLanes ? Pairs{load_bf16(a), load_bf16(b)} : Pairs{load_bf16_n(a, n), load_bf16_n(b, n)};
}

SHOAL_INLINE Pairs load_pairs(const uint16_t* p) {
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const __m256i odd = _mm256_and_si256(both, _mm256_set1_epi32(static_cast<int>(0xFFFF0000)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(both, 16)), _mm256_castsi256_ps(odd)};
}
SHOAL_INLINE F32 dot_quad(F32 acc, const Pairs& w, const uint16_t* x4, int) {
    int64_t four;
    __builtin_memcpy(&four, x4, 8);
    const __m256i all = _mm256_set1_epi64x(four);
    const __m256i odd = _mm256_and_si256(all, _mm256_set1_epi32(static_cast<int>(0xFFFF0000)));
    acc = fma(w.even, _mm256_castsi256_ps(_mm256_slli_epi32(all, 16)), acc);
    return fma(w.odd, _mm256_castsi256_ps(odd), acc);
}
constexpr int kZipped = 1;
SHOAL_INLINE void store_zipped(uint16_t* p, F32 even, F32 odd) {
    const __m128i low = narrow_bf16(even), high = narrow_bf16(odd);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_unpacklo_epi16(low, high));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + kLanes), _mm_unpackhi_epi16(low, high));
}

}  // namespace
}  // namespace shoal::avx2
