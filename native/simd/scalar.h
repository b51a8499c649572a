// One lane and plain C++: the baseline of every architecture. See common.h for the contract.
#pragma once

#include "simd/common.h"

#define SHOAL_ISA scalar

namespace shoal::scalar {
namespace {

using F32 = float;
using I32 = int32_t;
struct I8 {
    int8_t v[4];
};
constexpr int kLanes = 1;
constexpr int kBytes = 4;

template <class To, class From>
SHOAL_INLINE To bits(From value) {
    static_assert(sizeof(To) == sizeof(From));
    return __builtin_bit_cast(To, value);
}

SHOAL_INLINE F32 zero() { return 0.0f; }
SHOAL_INLINE F32 set1(float x) { return x; }
SHOAL_INLINE F32 load(const float* p) { return read<float>(p); }
SHOAL_INLINE F32 load_n(const float* p, int) { return read<float>(p); }
SHOAL_INLINE void store(float* p, F32 v) { __builtin_memcpy(static_cast<void*>(p), &v, sizeof(v)); }
SHOAL_INLINE void store_n(float* p, F32 v, int) { store(p, v); }

SHOAL_INLINE F32 add(F32 a, F32 b) { return a + b; }
SHOAL_INLINE F32 sub(F32 a, F32 b) { return a - b; }
SHOAL_INLINE F32 mul(F32 a, F32 b) { return a * b; }
SHOAL_INLINE F32 div(F32 a, F32 b) { return a / b; }
SHOAL_INLINE F32 fma(F32 a, F32 b, F32 c) { return a * b + c; }
SHOAL_INLINE F32 max(F32 a, F32 b) { return a > b ? a : b; }
SHOAL_INLINE F32 select_lt(F32 a, F32 b, F32 yes, F32 no) { return a < b ? yes : no; }

SHOAL_INLINE float sum(F32 v) { return v; }
SHOAL_INLINE float max_of(F32 v) { return v; }

SHOAL_INLINE F32 pow2(F32 n) {  // 1.5 * 2^23 + n holds n in its low bits; a conversion would be undefined for NaN
    return bits<float>((bits<uint32_t>(n + 12582912.0f) << 23) + 0x3F800000);
}

SHOAL_INLINE F32 load_bf16(const uint16_t* p) { return bits<float>(static_cast<uint32_t>(read<uint16_t>(p)) << 16); }
SHOAL_INLINE F32 load_bf16_n(const uint16_t* p, int) { return load_bf16(p); }
SHOAL_INLINE void store_bf16(uint16_t* p, F32 v) {
    const uint32_t u = bits<uint32_t>(v);
    const uint32_t rounded = v == v ? u + 0x7FFF + ((u >> 16) & 1) : u | 0x400000;  // a NaN stays one
    const uint16_t out = static_cast<uint16_t>(rounded >> 16);
    __builtin_memcpy(static_cast<void*>(p), &out, sizeof(out));
}
SHOAL_INLINE void store_bf16_n(uint16_t* p, F32 v, int) { store_bf16(p, v); }

SHOAL_INLINE float f16_to_f32(uint16_t h) {
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
    const uint32_t magnitude = h & 0x7FFF;
    if (magnitude >= 0x7C00) {  // infinity or NaN
        return bits<float>(sign | 0x7F800000 | (magnitude & 0x3FF) << 13);
    }
    // Exponents are rebiased by a multiplication, which also normalises subnormal halves: 2^112.
    const float value = bits<float>(magnitude << 13) * bits<float>(uint32_t{0x77800000});
    return bits<float>(bits<uint32_t>(value) | sign);
}

SHOAL_INLINE F32 dot_bf16(F32 acc, const uint16_t* a, const uint16_t* b) {
    return acc + load_bf16(a) * load_bf16(b) + load_bf16(a + 1) * load_bf16(b + 1);
}

SHOAL_INLINE I8 load_i8(const int8_t* p) { return read<I8>(p); }
SHOAL_INLINE I32 izero() { return 0; }
SHOAL_INLINE I32 dot_i8(I32 acc, I8 a, I8 b) {
    return acc + a.v[0] * b.v[0] + a.v[1] * b.v[1] + a.v[2] * b.v[2] + a.v[3] * b.v[3];
}
SHOAL_INLINE int32_t isum(I32 v) { return v; }
SHOAL_INLINE F32 to_f32(I32 v) { return static_cast<float>(v); }

constexpr int kMaxTokenBlocks = 1;
constexpr int kQueryBlock = 8;
constexpr int32_t kStoredOffset = 0;

SHOAL_INLINE I32 iset1(int32_t x) { return x; }
SHOAL_INLINE I8 stored_codes(const uint8_t* p) { return bits<I8>(read<uint32_t>(p) ^ 0x80808080u); }
SHOAL_INLINE I8 low_nibbles(I8 v) { return bits<I8>(bits<uint32_t>(v) & 0x0F0F0F0Fu); }
SHOAL_INLINE I8 high_nibbles(I8 v) { return bits<I8>(bits<uint32_t>(v) >> 4 & 0x0F0F0F0Fu); }
SHOAL_INLINE I32 dot_codes(I32 acc, I8 w, const int8_t* x4) { return dot_i8(acc, w, read<I8>(x4)); }
SHOAL_INLINE I32 round_i32(F32 v) {  // adding 1.5 * 2^23 leaves the whole number in the low bits
    return static_cast<int32_t>(bits<uint32_t>(v + 12582912.0f) - 0x4B400000u);
}
SHOAL_INLINE void store_codes(int8_t* p, I32 v) { *p = static_cast<int8_t>(v); }
SHOAL_INLINE I32 iadd(I32 a, I32 b) { return a + b; }
SHOAL_INLINE I32 load_codes(const int8_t* p) { return *p; }
SHOAL_INLINE F32 load_f16(const uint16_t* p) { return f16_to_f32(read<uint16_t>(p)); }

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

SHOAL_INLINE Pairs load_pairs(const uint16_t* p) { return {load_bf16(p), load_bf16(p + 1)}; }
SHOAL_INLINE F32 dot_quad(F32 acc, const Pairs& w, const uint16_t* x4, int part) {
    return dot_pair(acc, w, x4 + part % 2 * 2);
}
constexpr int kZipped = 1;
SHOAL_INLINE void store_zipped(uint16_t* p, F32 even, F32 odd) {
    store_bf16(p, even);
    store_bf16(p + 1, odd);
}

}  // namespace
}  // namespace shoal::scalar
