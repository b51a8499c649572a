// From weights as files store them to the packed layout (include/shoal/packed.h).
#pragma once
#include <cstring>

#include "shoal/packed.h"

namespace shoal {

// How rows arrive. q8_0, q4_0, q4_1 and q4_k are GGUF's blocks; codes8 and codes4 are int8 codes with f32 scales a
// group (any multiple of 32 columns), the form of compressed-tensors.
enum class Source : int32_t { f32 = 0, bf16 = 1, f16 = 2, q8_0 = 3, q4_0 = 4, q4_1 = 5, q4_k = 6, codes = 7 };

struct SourceRows {
    Source kind;
    const uint8_t* data;  // row-major, `row_bytes` apart
    long row_bytes;
    const float* scales = nullptr;  // codes: [rows, cols / group]
    const float* minima = nullptr;  // codes with zero points: added after scaling, same shape; may be null
    long group = 32;
};

// True if rows of this kind can be packed so. Float sources go into every packing (and are quantised on the way);
// quantised ones keep their codes and go into the packing of their own width.
bool can_pack(Source source, Packing packing);

// Packs rows [0, rows) into `out` (PackedMatrix::bytes() bytes), using `threads` threads. Codes must fit the packing;
// q8_0, q4_0 and q4_1 rows are whole blocks of 32 columns, q4_k rows of 256. Scales and minima are rounded to f16:
// exact for GGUF's blocks of 32, whose own they are; a q4_k group's product of two scales loses up to 2^-11 of itself.
void pack_rows(const SourceRows& source, long rows, long cols, Packing packing, uint8_t* out, int threads);

// The inverse, for tests and for embedding look-ups: one row as f32.
void unpack_row(const PackedMatrix& matrix, long row, float* out);

float half_to_float(uint16_t half);
uint16_t float_to_half(float value);
inline float bf16_to_float(uint16_t value) {
    const uint32_t bits = uint32_t(value) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

inline uint16_t float_to_bf16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (value != value) return uint16_t((bits >> 16) | 0x40);  // rounding could turn a NaN into an infinity
    return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

}  // namespace shoal
