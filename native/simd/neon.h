// Armv8.2-A with the int8 dot product: four lanes. See common.h for the contract.
#pragma once

#include <arm_neon.h>

#include "simd/common.h"

#define SHOAL_ISA neon

namespace shoal::neon {
namespace {

using F32 = float32x4_t;
using I32 = int32x4_t;
using I8 = int8x16_t;
constexpr int kLanes = 4;
constexpr int kBytes = 16;

SHOAL_INLINE F32 zero() { return vdupq_n_f32(0.0f); }
SHOAL_INLINE F32 set1(float x) { return vdupq_n_f32(x); }
SHOAL_INLINE F32 load(const float* p) { return vld1q_f32(p); }
SHOAL_INLINE F32 load_n(const float* p, int n) {
    float lanes[kLanes] = {};
    __builtin_memcpy(lanes, p, static_cast<unsigned>(n) * sizeof(float));
    return vld1q_f32(lanes);
}
SHOAL_INLINE void store(float* p, F32 v) { vst1q_f32(p, v); }
SHOAL_INLINE void store_n(float* p, F32 v, int n) {
    float lanes[kLanes];
    vst1q_f32(lanes, v);
    __builtin_memcpy(static_cast<void*>(p), lanes, static_cast<unsigned>(n) * sizeof(float));
}

SHOAL_INLINE F32 add(F32 a, F32 b) { return vaddq_f32(a, b); }
SHOAL_INLINE F32 sub(F32 a, F32 b) { return vsubq_f32(a, b); }
SHOAL_INLINE F32 mul(F32 a, F32 b) { return vmulq_f32(a, b); }
SHOAL_INLINE F32 div(F32 a, F32 b) { return vdivq_f32(a, b); }
SHOAL_INLINE F32 fma(F32 a, F32 b, F32 c) { return vfmaq_f32(c, a, b); }
SHOAL_INLINE F32 max(F32 a, F32 b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }  // vmaxq_f32 differs on NaN
SHOAL_INLINE F32 select_lt(F32 a, F32 b, F32 yes, F32 no) { return vbslq_f32(vcltq_f32(a, b), yes, no); }

SHOAL_INLINE float sum(F32 v) { return vaddvq_f32(v); }
SHOAL_INLINE float max_of(F32 v) { return vmaxvq_f32(v); }

SHOAL_INLINE F32 pow2(F32 n) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23));
}

SHOAL_INLINE F32 widen_bf16(uint16x4_t v) { return vreinterpretq_f32_u32(vshll_n_u16(v, 16)); }
SHOAL_INLINE uint16x4_t narrow_bf16(F32 v) {
    const uint32x4_t u = vreinterpretq_u32_f32(v);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(u, vaddq_u32(odd, vdupq_n_u32(0x7FFF)));
    const uint32x4_t quiet = vorrq_u32(u, vdupq_n_u32(0x400000));  // a NaN stays one
    return vshrn_n_u32(vbslq_u32(vceqq_f32(v, v), rounded, quiet), 16);
}
SHOAL_INLINE F32 load_bf16(const uint16_t* p) { return widen_bf16(vld1_u16(p)); }
SHOAL_INLINE F32 load_bf16_n(const uint16_t* p, int n) {
    uint16_t lanes[kLanes] = {};
    __builtin_memcpy(lanes, p, static_cast<unsigned>(n) * sizeof(uint16_t));
    return widen_bf16(vld1_u16(lanes));
}
SHOAL_INLINE void store_bf16(uint16_t* p, F32 v) { vst1_u16(p, narrow_bf16(v)); }
SHOAL_INLINE void store_bf16_n(uint16_t* p, F32 v, int n) {
    uint16_t lanes[kLanes];
    vst1_u16(lanes, narrow_bf16(v));
    __builtin_memcpy(static_cast<void*>(p), lanes, static_cast<unsigned>(n) * sizeof(uint16_t));
}
SHOAL_INLINE float f16_to_f32(uint16_t h) {
    return vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(h))), 0);
}

SHOAL_INLINE F32 dot_bf16(F32 acc, const uint16_t* a, const uint16_t* b) {
    acc = fma(load_bf16(a), load_bf16(b), acc);
    return fma(load_bf16(a + kLanes), load_bf16(b + kLanes), acc);
}

SHOAL_INLINE I8 load_i8(const int8_t* p) { return vld1q_s8(p); }
SHOAL_INLINE I32 izero() { return vdupq_n_s32(0); }
SHOAL_INLINE I32 dot_i8(I32 acc, I8 a, I8 b) { return vdotq_s32(acc, a, b); }
SHOAL_INLINE int32_t isum(I32 v) { return vaddvq_s32(v); }
SHOAL_INLINE F32 to_f32(I32 v) { return vcvtq_f32_s32(v); }

constexpr int kMaxTokenBlocks = 1;
constexpr int kQueryBlock = 16;
constexpr int32_t kStoredOffset = 0;

SHOAL_INLINE I32 iset1(int32_t x) { return vdupq_n_s32(x); }
SHOAL_INLINE I8 stored_codes(const uint8_t* p) { return vreinterpretq_s8_u8(veorq_u8(vld1q_u8(p), vdupq_n_u8(128))); }
SHOAL_INLINE I8 low_nibbles(I8 v) { return vandq_s8(v, vdupq_n_s8(15)); }
SHOAL_INLINE I8 high_nibbles(I8 v) { return vreinterpretq_s8_u8(vshrq_n_u8(vreinterpretq_u8_s8(v), 4)); }
SHOAL_INLINE I32 dot_codes(I32 acc, I8 w, const int8_t* x4) {
    int32_t four;
    __builtin_memcpy(&four, x4, 4);
    return vdotq_s32(acc, w, vreinterpretq_s8_s32(vdupq_n_s32(four)));
}
SHOAL_INLINE I32 round_i32(F32 v) { return vcvtnq_s32_f32(v); }
SHOAL_INLINE void store_codes(int8_t* p, I32 v) {
    const int8x8_t bytes = vmovn_s16(vcombine_s16(vmovn_s32(v), vdup_n_s16(0)));
    const int32_t four = vget_lane_s32(vreinterpret_s32_s8(bytes), 0);
    __builtin_memcpy(static_cast<void*>(p), &four, 4);
}
SHOAL_INLINE I32 iadd(I32 a, I32 b) { return vaddq_s32(a, b); }
SHOAL_INLINE I32 load_codes(const int8_t* p) {
    int32_t four;
    __builtin_memcpy(&four, p, 4);
    return vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four)))));
}
SHOAL_INLINE F32 load_f16(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }

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
    const uint16x4x2_t both = vld2_u16(p);
    return {widen_bf16(both.val[0]), widen_bf16(both.val[1])};
}
SHOAL_INLINE F32 dot_quad(F32 acc, const Pairs& w, const uint16_t* x4, int) {
    const uint16x4_t four = vld1_u16(x4);
    acc = fma(w.even, widen_bf16(vuzp1_u16(four, four)), acc);
    return fma(w.odd, widen_bf16(vuzp2_u16(four, four)), acc);
}
constexpr int kZipped = 1;
SHOAL_INLINE void store_zipped(uint16_t* p, F32 even, F32 odd) {
    vst2_u16(p, uint16x4x2_t{{narrow_bf16(even), narrow_bf16(odd)}});
}

}  // namespace
}  // namespace shoal::neon
