// Packed weights: the one layout that every instruction set's kernels read.
//
// A matrix W[rows, cols] (y = W x) is cut into tiles of 16 rows and blocks of 64 columns; rows and columns are padded
// with zeros. A tile's blocks follow each other, so that a tile is one stream of bytes. Inside a block a step is 4
// columns: 16 rows x 4 codes = 64 bytes, the operand of one dot-product instruction. A group is 32 columns with its own
// scale. Padding has scale and minimum 0. A group whose scale does not fit f16 (values past 8.3e6 in q8, 5.2e5 in q4)
// has an infinite one: its products are not finite rather than wrong.
//
//   q8   2 x 16 scales (f16), then 16 steps of codes stored as code + 128 (unsigned)
//   q4   2 x 16 scales (f16), then per group 4 vectors: low nibbles are step v, high nibbles step v + 4; code - 8
//   q4m  2 x 16 scales, 2 x 16 minima (f16), then as q4; value = scale * code + minimum
//   bf16, f32   [64 columns][16 rows]
#pragma once
#include <cstddef>
#include <cstdint>

namespace shoal {

enum class Packing : int32_t { f32 = 0, bf16 = 1, q8 = 2, q4 = 3, q4m = 4 };

constexpr long kTileRows = 16;
constexpr long kBlockCols = 64;
constexpr long kGroup = 32;
constexpr long kPackings = 5;

constexpr size_t block_bytes(Packing packing) {
    switch (packing) {
        case Packing::f32:
            return 64 * 16 * 4;
        case Packing::bf16:
            return 64 * 16 * 2;
        case Packing::q8:
            return 64 + 16 * 64;
        case Packing::q4:
            return 64 + 8 * 64;
        case Packing::q4m:
            return 128 + 8 * 64;
    }
    return 0;
}

constexpr long round_up(long value, long unit) { return (value + unit - 1) / unit * unit; }

struct PackedMatrix {
    Packing packing;
    long rows, cols;
    const uint8_t* data;
    long tiles() const { return (rows + kTileRows - 1) / kTileRows; }
    long blocks() const { return (cols + kBlockCols - 1) / kBlockCols; }
    size_t tile_bytes() const { return blocks() * block_bytes(packing); }
    size_t bytes() const { return tiles() * tile_bytes(); }
    bool quantised() const { return packing != Packing::f32 && packing != Packing::bf16; }
};

// Activations beside their int8 form. `lanes` tokens are interleaved: dword k/4 of token t stands at [k/4][t].
// lanes is 1 (plain rows) or 4; a token's scale and code sum of group g stand at [g][t] likewise.
struct QuantRows {
    const int8_t* codes;  // [ceil(T / lanes)][padded cols / 4][lanes][4]
    const float* scales;  // [ceil(T / lanes)][padded cols / 32][lanes]
    const int32_t* sums;  // as scales: sum of the group's codes
};

}  // namespace shoal
