// x86-64-v4 with VNNI and BF16: sixteen lanes. See common.h for the contract.
#pragma once

#include <immintrin.h>

#include "simd/common.h"

#define SHOAL_ISA avx512

namespace shoal::avx512 {
namespace {

using F32 = __m512;
using I32 = __m512i;
using I8 = __m512i;
constexpr int kLanes = 16;
constexpr int kBytes = 64;

SHOAL_INLINE __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1u); }

SHOAL_INLINE F32 zero() { return _mm512_setzero_ps(); }
SHOAL_INLINE F32 set1(float x) { return _mm512_set1_ps(x); }
SHOAL_INLINE F32 load(const float* p) { return _mm512_loadu_ps(p); }
SHOAL_INLINE F32 load_n(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
SHOAL_INLINE void store(float* p, F32 v) { _mm512_storeu_ps(p, v); }
SHOAL_INLINE void store_n(float* p, F32 v, int n) { _mm512_mask_storeu_ps(p, first(n), v); }

SHOAL_INLINE F32 add(F32 a, F32 b) { return _mm512_add_ps(a, b); }
SHOAL_INLINE F32 sub(F32 a, F32 b) { return _mm512_sub_ps(a, b); }
SHOAL_INLINE F32 mul(F32 a, F32 b) { return _mm512_mul_ps(a, b); }
SHOAL_INLINE F32 div(F32 a, F32 b) { return _mm512_div_ps(a, b); }
SHOAL_INLINE F32 fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }
SHOAL_INLINE F32 max(F32 a, F32 b) { return _mm512_max_ps(a, b); }
SHOAL_INLINE F32 select_lt(F32 a, F32 b, F32 yes, F32 no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
}

SHOAL_INLINE float sum(F32 v) { return _mm512_reduce_add_ps(v); }
SHOAL_INLINE float max_of(F32 v) { return _mm512_reduce_max_ps(v); }

SHOAL_INLINE F32 pow2(F32 n) { return _mm512_scalef_ps(_mm512_set1_ps(1.0f), n); }

SHOAL_INLINE F32 widen_bf16(__m256i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16)); }
// In integers, as on the other instruction sets: VCVTNEPS2BF16 would flush subnormal values.
SHOAL_INLINE __m256i narrow_bf16(F32 v) {
    const __m512i u = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i chosen = _mm512_mask_or_epi32(rounded, is_nan, u, _mm512_set1_epi32(0x400000));  // a NaN stays one
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(chosen, 16));
}
SHOAL_INLINE F32 load_bf16(const uint16_t* p) {
    return widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
SHOAL_INLINE F32 load_bf16_n(const uint16_t* p, int n) { return widen_bf16(_mm256_maskz_loadu_epi16(first(n), p)); }
SHOAL_INLINE void store_bf16(uint16_t* p, F32 v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(v)); }
SHOAL_INLINE void store_bf16_n(uint16_t* p, F32 v, int n) { _mm256_mask_storeu_epi16(p, first(n), narrow_bf16(v)); }
SHOAL_INLINE float f16_to_f32(uint16_t h) { return _cvtsh_ss(h); }

SHOAL_INLINE F32 dot_bf16(F32 acc, const uint16_t* a, const uint16_t* b) {
    return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(_mm512_loadu_si512(a)),
                            reinterpret_cast<__m512bh>(_mm512_loadu_si512(b)));
}

SHOAL_INLINE I8 load_i8(const int8_t* p) { return _mm512_loadu_si512(p); }
SHOAL_INLINE I32 izero() { return _mm512_setzero_si512(); }
SHOAL_INLINE I32 dot_i8(I32 acc, I8 a, I8 b) {
    // VPDPBUSD multiplies unsigned by signed: |a| * (b with the sign of a).
    const __m512i signed_b = _mm512_mask_sub_epi8(b, _mm512_movepi8_mask(a), _mm512_setzero_si512(), b);
    return _mm512_dpbusd_epi32(acc, _mm512_abs_epi8(a), signed_b);
}
SHOAL_INLINE int32_t isum(I32 v) { return _mm512_reduce_add_epi32(v); }
SHOAL_INLINE F32 to_f32(I32 v) { return _mm512_cvtepi32_ps(v); }

constexpr int kMaxTokenBlocks = 3;
constexpr int kQueryBlock = 8;
constexpr int32_t kStoredOffset = 128;  // VPDPBUSD takes the stored bytes as they are

SHOAL_INLINE I32 iset1(int32_t x) { return _mm512_set1_epi32(x); }
SHOAL_INLINE I8 stored_codes(const uint8_t* p) { return _mm512_loadu_si512(p); }
SHOAL_INLINE I8 low_nibbles(I8 v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
SHOAL_INLINE I8 high_nibbles(I8 v) { return _mm512_and_si512(_mm512_srli_epi16(v, 4), _mm512_set1_epi8(15)); }
SHOAL_INLINE I32 dot_codes(I32 acc, I8 w, const int8_t* x4) {
    int32_t four;
    __builtin_memcpy(&four, x4, 4);
    return _mm512_dpbusd_epi32(acc, w, _mm512_set1_epi32(four));
}
SHOAL_INLINE I32 round_i32(F32 v) { return _mm512_cvtps_epi32(v); }
SHOAL_INLINE void store_codes(int8_t* p, I32 v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(v));
}
SHOAL_INLINE I32 iadd(I32 a, I32 b) { return _mm512_add_epi32(a, b); }
SHOAL_INLINE I32 load_codes(const int8_t* p) {
    return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
SHOAL_INLINE F32 load_f16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

using Pairs = __m512bh;
SHOAL_INLINE Pairs load_pairs(const uint16_t* p) { return reinterpret_cast<Pairs>(_mm512_loadu_si512(p)); }
SHOAL_INLINE Pairs zip_rows(const uint16_t* a, const uint16_t* b, int n) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(n), a));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(n), b));
    return reinterpret_cast<Pairs>(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}
SHOAL_INLINE F32 dot_pair(F32 acc, Pairs w, const uint16_t* pair) {
    int32_t two;
    __builtin_memcpy(&two, pair, 4);
    return _mm512_dpbf16_ps(acc, w, reinterpret_cast<Pairs>(_mm512_set1_epi32(two)));
}
SHOAL_INLINE F32 dot_quad(F32 acc, Pairs w, const uint16_t* x4, int) {
    int64_t four;
    __builtin_memcpy(&four, x4, 8);
    return _mm512_dpbf16_ps(acc, w, reinterpret_cast<Pairs>(_mm512_set1_epi64(four)));
}
constexpr int kZipped = 2;
SHOAL_INLINE void zip_wide(const uint16_t* a, const uint16_t* b, Pairs (&out)[kZipped]) {
    const __m512i step = _mm512_set1_epi32(0x00010001);
    __m512i at = _mm512_set_epi32(0x2F000F, 0x2E000E, 0x2D000D, 0x2C000C, 0x2B000B, 0x2A000A, 0x290009, 0x280008,
                                  0x270007, 0x260006, 0x250005, 0x240004, 0x230003, 0x220002, 0x210001, 0x200000);
    const __m512i low = _mm512_loadu_si512(a), high = _mm512_loadu_si512(b);
    out[0] = reinterpret_cast<Pairs>(_mm512_permutex2var_epi16(low, at, high));
    at = _mm512_add_epi16(at, _mm512_slli_epi16(step, 4));
    out[1] = reinterpret_cast<Pairs>(_mm512_permutex2var_epi16(low, at, high));
}
SHOAL_INLINE void store_zipped(uint16_t* p, F32 even, F32 odd) {
    const __m512i low = _mm512_cvtepu16_epi32(narrow_bf16(even)), high = _mm512_cvtepu16_epi32(narrow_bf16(odd));
    _mm512_storeu_si512(p, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}

}  // namespace
}  // namespace shoal::avx512
