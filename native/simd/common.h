// What the vector headers share. Each of them defines, in shoal::<isa> and with internal linkage:
//
//   F32 (kLanes floats), I32 (kLanes int32), I8 (kBytes = 4 * kLanes int8)
//   zero set1 load load_n store store_n add sub mul div fma max select_lt     f32; fma(a, b, c) = a * b + c
//   sum max_of                                                               across lanes
//   pow2                                                                     2^n of a whole n in [-126, 127]
//   load_bf16 load_bf16_n store_bf16 store_bf16_n f16_to_f32                 16-bit formats, round to nearest even
//   dot_bf16(acc, a, b)                                                      acc += products of 2 * kLanes bf16
//   load_i8 dot_i8(acc, a, b) izero isum to_f32                              acc += groups of 4 products
//   I8 of unsigned bytes: stored_codes (q8 codes as dot_codes wants them) low_nibbles high_nibbles
//   dot_codes(acc, w, x4)           acc += groups of 4 products of w with the 4 int8 at x4, the same for every lane;
//                                   w is stored_codes or nibbles; what stored_codes adds to a code is kStoredOffset
//   iset1 load_f16                  int32 broadcast; kLanes halves
//   load_codes                      kLanes int8 to int32
//   iadd round_i32 store_codes      sum; f32 to int32, ties to even; the low bytes of kLanes int32 in [-127, 127]
//   Pairs load_pairs zip_rows dot_pair   2 * kLanes bf16: as stored; of two rows, element by element; acc += products
//                                        with the two bf16 at a pointer, the same for every lane
//   zip_wide                        zip_rows of kZipped * kLanes elements; where kZipped is 1 there is none
//   dot_quad(acc, w, x4, part)      as dot_pair, with the first two of the four bf16 at x4 in lanes of even number and
//                                   the last two in the others; the lanes are those from part * kLanes on
//   store_zipped(p, even, odd)      2 * kLanes bf16, the elements of two F32 by turns
//   kMaxTokenBlocks kQueryBlock                  how many accumulators the registers hold
//
// The _n forms touch the first n elements of memory (0 < n <= kLanes) and read the rest as zero. max(a, b) is
// a > b ? a : b, so that a NaN in a is dropped and one in b is kept. dot_i8 needs b in [-127, 127]; a may be anything.
// dot_bf16 may flush subnormal values to zero.
#pragma once

#include <cstdint>

#define SHOAL_INLINE inline __attribute__((always_inline))

namespace shoal {
namespace {

template <class T>
SHOAL_INLINE T read(const void* p) {  // memcpy: a tensor in a mapped file may start at an odd byte
    T value;
    __builtin_memcpy(&value, p, sizeof(T));
    return value;
}

}  // namespace
}  // namespace shoal
