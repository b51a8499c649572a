#include "engine/pack.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>

namespace shoal {
namespace {

struct Group {
    float scale = 0, minimum = 0;
    uint8_t codes[kGroup] = {};  // already in the packed form's offset: q8 code + 128, q4 code 0..15
};

// The stored code of a zero in padding, whose scale and minimum are 0 too.
constexpr uint8_t zero_code(Packing packing) { return packing == Packing::q8 ? 128 : packing == Packing::q4 ? 8 : 0; }

uint16_t load16(const uint8_t* at) {
    uint16_t value;
    std::memcpy(&value, at, 2);
    return value;
}

float float_at(const SourceRows& source, const uint8_t* row, long col) {
    if (source.kind == Source::f32) {
        float value;
        std::memcpy(&value, row + 4 * col, 4);
        return value;
    }
    const uint16_t bits = load16(row + 2 * col);
    return source.kind == Source::f16 ? half_to_float(bits) : bf16_to_float(bits);
}

// 1 / scale; 0 where the scale is 0 or so small that the quotient is no float: every code then stands for zero.
float inverse_of(float scale) {
    const float inverse = 1.0f / scale;
    return std::isfinite(inverse) ? inverse : 0.0f;
}

// Rounds n <= 32 values to codes as GGUF's own quantiser does; the columns beyond them stand for zero. A value that is
// not finite makes the scale NaN, so that it shows in every product.
void quantise(const float* values, long n, Packing packing, Group& group) {
    float low = values[0], high = values[0], peak = values[0];
    bool finite = true;
    for (long k = 0; k < n; ++k) {
        low = std::min(low, values[k]);
        high = std::max(high, values[k]);
        if (std::fabs(values[k]) > std::fabs(peak)) peak = values[k];
        finite = finite && std::isfinite(values[k]);
    }
    const float scale = packing == Packing::q8   ? std::fabs(peak) / 127.0f
                        : packing == Packing::q4 ? peak / -8.0f
                                                 : (high - low) / 15.0f;
    const float inverse = inverse_of(scale);
    group.scale = finite ? scale : std::numeric_limits<float>::quiet_NaN();
    std::fill(group.codes, group.codes + kGroup, zero_code(packing));
    if (packing == Packing::q4m) group.minimum = low;
    for (long k = 0; finite && k < n; ++k) {
        if (packing == Packing::q8) {
            group.codes[k] = uint8_t(128 + int(std::lround(values[k] * inverse)));
            continue;
        }
        const float shifted = packing == Packing::q4 ? values[k] * inverse + 8.5f : (values[k] - low) * inverse + 0.5f;
        group.codes[k] = uint8_t(std::clamp(int(std::floor(shifted)), 0, 15));
    }
}

void split_nibbles(const uint8_t* packed, uint8_t* codes) {
    for (long k = 0; k < 16; ++k) {
        codes[k] = packed[k] & 15;
        codes[k + 16] = packed[k] >> 4;
    }
}

// A q4_k super-block: 256 columns, f16 d and dmin, 8 six-bit scales and minima in 12 bytes, 128 bytes of nibbles.
void decode_q4_k(const uint8_t* row, long group_index, Group& group) {
    const uint8_t* block = row + group_index / 8 * 144;
    const long sub = group_index % 8;
    const uint8_t* packed = block + 4;
    int scale, minimum;
    if (sub < 4) {
        scale = packed[sub] & 63;
        minimum = packed[sub + 4] & 63;
    } else {
        scale = (packed[sub + 4] & 15) | ((packed[sub - 4] >> 6) << 4);
        minimum = (packed[sub + 4] >> 4) | ((packed[sub] >> 6) << 4);
    }
    group.scale = half_to_float(load16(block)) * float(scale);
    group.minimum = -half_to_float(load16(block + 2)) * float(minimum);
    const uint8_t* codes = block + 16 + sub / 2 * 32;
    for (long k = 0; k < kGroup; ++k) group.codes[k] = sub % 2 ? codes[k] >> 4 : codes[k] & 15;
}

void decode(const SourceRows& source, const uint8_t* row, long row_index, long group_index, long cols, Packing packing,
            Group& group) {
    const long first = group_index * kGroup;
    group = Group{};
    switch (source.kind) {
        case Source::q8_0: {
            const uint8_t* block = row + group_index * 34;
            group.scale = half_to_float(load16(block));
            for (long k = 0; k < kGroup; ++k) group.codes[k] = uint8_t(block[2 + k] + 128);
            return;
        }
        case Source::q4_0:
            group.scale = half_to_float(load16(row + group_index * 18));
            return split_nibbles(row + group_index * 18 + 2, group.codes);
        case Source::q4_1:
            group.scale = half_to_float(load16(row + group_index * 20));
            group.minimum = half_to_float(load16(row + group_index * 20 + 2));
            return split_nibbles(row + group_index * 20 + 4, group.codes);
        case Source::q4_k:
            return decode_q4_k(row, group_index, group);
        case Source::codes: {
            const long at = row_index * ((cols + source.group - 1) / source.group) + first / source.group;
            group.scale = source.scales[at];
            if (source.minima) group.minimum = source.minima[at];
            const int offset = zero_code(packing);
            for (long k = 0; k < kGroup; ++k)
                group.codes[k] = uint8_t((first + k < cols ? int8_t(row[first + k]) : 0) + offset);
            return;
        }
        default: {
            float values[kGroup];
            const long n = std::min(kGroup, cols - first);
            for (long k = 0; k < n; ++k) values[k] = float_at(source, row, first + k);
            quantise(values, n, packing, group);
        }
    }
}

void place(const Group& group, Packing packing, long row, long half, uint8_t* block) {
    auto* scales = reinterpret_cast<uint16_t*>(block);
    scales[half * 16 + row] = float_to_half(group.scale);
    uint8_t* codes = block + 64;
    if (packing == Packing::q8) {
        for (long k = 0; k < kGroup; ++k) codes[(half * 8 + k / 4) * 64 + row * 4 + k % 4] = group.codes[k];
        return;
    }
    if (packing == Packing::q4m) {
        scales[32 + half * 16 + row] = float_to_half(group.minimum);
        codes += 64;
    }
    for (long k = 0; k < 16; ++k)
        codes[(half * 4 + k / 4) * 64 + row * 4 + k % 4] = uint8_t(group.codes[k] | group.codes[k + 16] << 4);
}

// GGUF's plain blocks hold the packed form's bytes already: a step of q8 codes is 4 bytes of the block plus 128, and a
// byte of q4 pairs the codes k and k + 16 in both. So packing is a transposition of 4-byte words, as fast as memory
// allows.
constexpr long stored_bytes(Source kind) { return kind == Source::q8_0 ? 34 : kind == Source::q4_0 ? 18 : 20; }

template <Source Kind>
void pack_plain_tile(const SourceRows& source, long tile, long rows, long cols, Packing packing, uint8_t* out) {
    constexpr long stored = stored_bytes(Kind), steps = Kind == Source::q8_0 ? 8 : 4;
    constexpr long head = Kind == Source::q4_1 ? 4 : 2, codes_at = Kind == Source::q4_1 ? 128 : 64;
    const size_t bytes = block_bytes(packing);
    const long lanes = std::min(kTileRows, rows - tile * kTileRows);
    for (long group = 0; group < cols / kGroup; ++group) {
        uint8_t* block = out + group / 2 * bytes;
        const long half = group % 2;
        for (long lane = 0; lane < lanes; ++lane) {
            const uint8_t* from = source.data + (tile * kTileRows + lane) * source.row_bytes + group * stored;
            std::memcpy(block + 2 * (half * 16 + lane), from, 2);
            if (Kind == Source::q4_1) std::memcpy(block + 64 + 2 * (half * 16 + lane), from + 2, 2);
            for (long step = 0; step < steps; ++step) {
                uint32_t word;
                std::memcpy(&word, from + head + 4 * step, 4);
                if (Kind == Source::q8_0) word ^= 0x80808080u;
                std::memcpy(block + codes_at + (half * steps + step) * 64 + lane * 4, &word, 4);
            }
        }
    }
}

// Likewise int8 codes: a byte's low four bits are its 4-bit code already, but for the offset.
void pack_code_tile(const SourceRows& source, long tile, long cols, Packing packing, uint8_t* out) {
    const size_t bytes = block_bytes(packing);
    const bool wide = packing == Packing::q8, with_minimum = packing == Packing::q4m;
    const long groups = (cols + source.group - 1) / source.group, steps = wide ? 8 : 4,
               codes_at = with_minimum ? 128 : 64;
    const uint32_t flip = packing == Packing::q4 ? 0x08080808u : 0;
    for (long group = 0; group < cols / kGroup; ++group) {
        uint8_t* block = out + group / 2 * bytes;
        auto* scales = reinterpret_cast<uint16_t*>(block);
        const long half = group % 2;
        for (long lane = 0; lane < kTileRows; ++lane) {
            const long row = tile * kTileRows + lane, at = row * groups + group * kGroup / source.group;
            const uint8_t* from = source.data + row * source.row_bytes + group * kGroup;
            scales[half * 16 + lane] = float_to_half(source.scales[at]);
            if (with_minimum) scales[32 + half * 16 + lane] = float_to_half(source.minima ? source.minima[at] : 0.0f);
            for (long step = 0; step < steps; ++step) {
                uint32_t word, high;
                std::memcpy(&word, from + 4 * step, 4);
                if (wide) {
                    word ^= 0x80808080u;
                } else {
                    std::memcpy(&high, from + 16 + 4 * step, 4);
                    word = ((word & 0x0f0f0f0fu) ^ flip) | ((high & 0x0f0f0f0fu) ^ flip) << 4;
                }
                std::memcpy(block + codes_at + (half * steps + step) * 64 + lane * 4, &word, 4);
            }
        }
    }
}

// Whether every byte of the tile comes from the fast path: whole groups in pairs and all 16 rows.
bool is_plain(const SourceRows& source, long tile, long rows, long cols) {
    const bool kind = source.kind == Source::q8_0 || source.kind == Source::q4_0 || source.kind == Source::q4_1 ||
                      source.kind == Source::codes;
    return kind && cols % kBlockCols == 0 && (tile + 1) * kTileRows <= rows;
}

void pack_tile(const SourceRows& source, long tile, long rows, long cols, Packing packing, uint8_t* out) {
    if (is_plain(source, tile, rows, cols)) {
        if (source.kind == Source::codes) return pack_code_tile(source, tile, cols, packing, out);
        if (source.kind == Source::q8_0) return pack_plain_tile<Source::q8_0>(source, tile, rows, cols, packing, out);
        if (source.kind == Source::q4_0) return pack_plain_tile<Source::q4_0>(source, tile, rows, cols, packing, out);
        return pack_plain_tile<Source::q4_1>(source, tile, rows, cols, packing, out);
    }
    const size_t bytes = block_bytes(packing);
    const long blocks = (cols + kBlockCols - 1) / kBlockCols, groups = (cols + kGroup - 1) / kGroup;
    std::memset(out, 0, blocks * bytes);
    for (long lane = 0; lane < kTileRows; ++lane) {
        const long row = tile * kTileRows + lane;
        const uint8_t* data = row < rows ? source.data + row * source.row_bytes : nullptr;
        for (long block = 0; block < blocks; ++block) {
            uint8_t* at = out + block * bytes;
            if (packing == Packing::f32 || packing == Packing::bf16) {
                for (long k = 0; data && k < std::min(kBlockCols, cols - block * kBlockCols); ++k) {
                    const float value = float_at(source, data, block * kBlockCols + k);
                    if (packing == Packing::f32)
                        reinterpret_cast<float*>(at)[k * 16 + lane] = value;
                    else
                        reinterpret_cast<uint16_t*>(at)[k * 16 + lane] = float_to_bf16(value);
                }
                continue;
            }
            for (long half = 0; half < 2; ++half) {
                Group group;
                const long index = block * 2 + half;
                if (data && index < groups)
                    decode(source, data, row, index, cols, packing, group);
                else
                    std::memset(group.codes, zero_code(packing), kGroup);
                place(group, packing, lane, half, at);
            }
        }
    }
}

}  // namespace

float half_to_float(uint16_t half) {
    const uint32_t sign = uint32_t(half & 0x8000) << 16;
    const uint32_t exponent = (half >> 10) & 31, mantissa = half & 1023;
    if (exponent == 0) {
        const float tiny = float(mantissa) * 0x1p-24f;
        return sign ? -tiny : tiny;
    }
    const uint32_t bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

uint16_t float_to_half(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint16_t sign = uint16_t((bits >> 16) & 0x8000);
    bits &= 0x7fffffff;
    if (bits >= 0x7f800000) return uint16_t(sign | 0x7c00 | (bits > 0x7f800000 ? 0x200 : 0));
    if (bits >= 0x477ff000) return uint16_t(sign | 0x7c00);  // rounds past the largest half
    if (bits < 0x38800000) {                                 // subnormal: count units of 2^-24, ties to even
        float magnitude;
        std::memcpy(&magnitude, &bits, 4);
        return uint16_t(sign | uint16_t(std::nearbyint(magnitude * 0x1p24f)));
    }
    bits += 0xfff + ((bits >> 13) & 1);
    return uint16_t(sign | ((bits - 0x38000000) >> 13));
}

bool can_pack(Source source, Packing packing) {
    switch (source) {
        case Source::f32:
        case Source::bf16:
        case Source::f16:
            return true;
        case Source::q8_0:
            return packing == Packing::q8;
        case Source::q4_0:
            return packing == Packing::q4;
        case Source::q4_1:
        case Source::q4_k:
            return packing == Packing::q4m;
        case Source::codes:
            return packing == Packing::q8 || packing == Packing::q4 || packing == Packing::q4m;
    }
    return false;
}

void pack_rows(const SourceRows& source, long rows, long cols, Packing packing, uint8_t* out, int threads) {
    const PackedMatrix shape{packing, rows, cols, out};
    const long tiles = shape.tiles();
    const long parts = std::clamp<long>(threads, 1, std::max<long>(tiles / 4, 1));
    auto pack_part = [&](long part) {
        for (long tile = tiles * part / parts; tile < tiles * (part + 1) / parts; ++tile)
            pack_tile(source, tile, rows, cols, packing, out + tile * shape.tile_bytes());
    };
    std::vector<std::thread> helpers;
    for (long part = 1; part < parts; ++part) helpers.emplace_back(pack_part, part);
    pack_part(0);
    for (auto& helper : helpers) helper.join();
}

void unpack_row(const PackedMatrix& matrix, long row, float* out) {
    const size_t bytes = block_bytes(matrix.packing);
    const uint8_t* tile = matrix.data + row / kTileRows * matrix.tile_bytes();
    const long lane = row % kTileRows;
    for (long col = 0; col < matrix.cols; ++col) {
        const uint8_t* block = tile + col / kBlockCols * bytes;
        const long k = col % kBlockCols, half = k / kGroup, in_group = k % kGroup;
        if (matrix.packing == Packing::f32) {
            out[col] = reinterpret_cast<const float*>(block)[k * 16 + lane];
            continue;
        }
        if (matrix.packing == Packing::bf16) {
            out[col] = bf16_to_float(reinterpret_cast<const uint16_t*>(block)[k * 16 + lane]);
            continue;
        }
        const float scale = half_to_float(load16(block + 2 * (half * 16 + lane)));
        if (matrix.packing == Packing::q8) {
            out[col] = scale * float(int(block[64 + (k / 4) * 64 + lane * 4 + k % 4]) - 128);
            continue;
        }
        const bool with_minimum = matrix.packing == Packing::q4m;
        const uint8_t byte = block[(with_minimum ? 128 : 64) + (half * 4 + in_group % 16 / 4) * 64 + lane * 4 + k % 4];
        const int code = in_group < 16 ? byte & 15 : byte >> 4;
        if (with_minimum)
            out[col] = scale * float(code) + half_to_float(load16(block + 64 + 2 * (half * 16 + lane)));
        else
            out[col] = scale * float(code - 8);
    }
}

}  // namespace shoal
