// The table of CPU kernels. Every instruction set has one constant table; the dispatcher picks one at load.
//
// Conventions: row-major; strides in elements between rows, elements of a row contiguous; sizes are int64_t and may be
// zero; x, y, weights and tiles need no alignment beyond a byte, what the executor itself makes (QuantRows, rest,
// everything of attend) that of its elements. A row kernel may write its result over its first input (y == x), rows may
// not overlap otherwise. Kernels do not allocate, throw, lock or use threads: the caller splits rows among threads, and
// a row's result does not depend on how many rows a call holds.
//
// To add a kernel: an entry here, its body in kernels/<name>.h, an include and a line in isa.inc, a NumPy twin in
// src/shoal/kernels/reference.py or reference_packed.py, tests/kernels/test_<name>.py, a case in native/tests and a
// line in docs/kernels.md.
#pragma once

#include <cstdint>

#include "shoal/packed.h"

namespace shoal {

// One block of at most 64 cached tokens as seen by at most 16 queries.
struct AttendRun {
    bool bf16;            // the cache and `queries` hold bf16, else f32
    const void* queries;  // scaled; f32 [key_width][16], or bf16 [key_width / 2][16][2] or [key_width / 4][8][4]
    int num_queries;
    int lanes;           // query_lanes(...) or 16: how many queries stand side by side
    const void* keys;    // [num_keys, key_width]
    const void* values;  // [num_keys, value_width]; may be the head of the keys
    int64_t key_stride, value_stride, key_width, value_width;  // key_width is even with bf16
    int64_t num_keys, first_key;                               // position of the first key
    const int32_t* last_key;  // [16]: the last position that a query sees, -1 for an unused lane
};

// A query for which 8 lanes are enough takes half the time. The results have the same bits.
constexpr int query_lanes(bool bf16, int64_t num_queries, int64_t key_width) {
    return bf16 && num_queries <= 8 && key_width % 4 == 0 ? 8 : 16;
}

struct Ops {
    const char* isa;

    // y = x / sqrt(mean(x^2) + eps) * weight, row by row. x, y [rows, cols]; weight [cols].
    void (*rms_norm)(const float* x, int64_t x_stride, const float* weight, float eps, float* y, int64_t y_stride,
                     int64_t rows, int64_t cols);

    // y = exp(scale * x - max) / sum, row by row. x, y [rows, cols]. A weight of -inf becomes exactly 0.
    void (*softmax)(const float* x, int64_t x_stride, float scale, float* y, int64_t y_stride, int64_t rows,
                    int64_t cols);

    // y = gate / (1 + exp(-gate)) * up. gate, up, y [rows, cols].
    void (*silu_mul)(const float* gate, int64_t gate_stride, const float* up, int64_t up_stride, float* y,
                     int64_t y_stride, int64_t rows, int64_t cols);

    // int8 groups of 32 columns of `rows` rows (a pointer each), interleaved by `lanes` (1 or 4): see QuantRows in
    // packed.h. Columns are padded to 64 and rows to a multiple of lanes with zeros. What the codes leave of x goes to
    // rest [rows, cols] unless that is null: quantised once more it makes activations of 16 bits. A group with a value
    // that is not finite gets a scale of NaN. The same bits on every instruction set.
    void (*quantize_rows)(const float* const* x, int64_t rows, int64_t cols, int64_t lanes, int8_t* codes,
                          float* scales, int32_t* sums, float* rest);

    // y = x W^T (or y += x W^T): `count` tiles of 16 rows of a packed q8, q4 or q4m matrix against `tokens` rows of x.
    // y [tokens, rows]; only the first `rows` of the tiles' rows are written. packing is a shoal::Packing. Groups are
    // added in the order of their columns, so the tables with fused multiply-add give the same bits.
    void (*matmul_q)(int32_t packing, const uint8_t* tiles, int64_t count, int64_t cols, int64_t rows,
                     const QuantRows* x, int64_t tokens, int64_t lanes, float* y, int64_t y_stride, bool add_to);

    // As matmul_q for W packed in f32 or bf16 and x in f32.
    void (*matmul_f)(int32_t packing, const uint8_t* tiles, int64_t count, int64_t cols, int64_t rows, const float* x,
                     int64_t x_stride, int64_t tokens, float* y, int64_t y_stride, bool add_to);

    // Cached int8 rows to bf16 [rows, width]: a row of `row_bytes` holds its codes and, from `scales_at` on, an f32
    // scale for every 64 of them.
    void (*widen_rows)(const uint8_t* x, int64_t row_bytes, int64_t scales_at, int64_t rows, int64_t width,
                       uint16_t* y);

    // y = scale * x in bf16, row by row. x, y [rows, cols]. The same bits on every instruction set.
    void (*narrow_rows)(const float* x, int64_t x_stride, float scale, uint16_t* y, int64_t y_stride, int64_t rows,
                        int64_t cols);

    // low = scale x A^T, onto the `rank` directions of an adapter (LoRA, arXiv 2106.09685). x [rows, cols]; a bf16
    // [rank, cols]; low [rows, rank]. A direction's sum does not depend on the others.
    void (*lora_shrink)(const float* x, int64_t x_stride, int64_t rows, int64_t cols, const uint16_t* a, int64_t rank,
                        float scale, float* low, int64_t low_stride);

    // y += low B^T. low [rows, rank]; b is B transposed, bf16 [rank, cols] in rows of b_stride; y [rows, cols].
    void (*lora_expand)(const float* low, int64_t low_stride, int64_t rows, int64_t rank, const uint16_t* b,
                        int64_t b_stride, int64_t cols, float* y, int64_t y_stride);

    // Folds one block of keys into a running softmax: top, total [16] and out [num_queries, value_width], which start
    // at -1e30, 0 and 0. The result is out / total. With bf16 the weights of a block's keys meet the values in bf16. A
    // lane that has seen no key yet holds finite numbers that its first key wipes out.
    void (*attend)(const AttendRun* run, float* top, float* total, float* out);
};

}  // namespace shoal
