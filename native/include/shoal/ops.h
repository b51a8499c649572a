// The table of CPU kernels. Every instruction set has one constant table; the dispatcher picks one at load.
//
// Conventions: row-major; strides in elements between rows, elements of a row contiguous; sizes are int64_t and may be
// zero; pointers need no alignment beyond a byte. A result may be written over its first input (y == x), rows may not
// overlap otherwise. Kernels do not allocate, throw, lock or use threads: the caller splits rows among threads, and a
// row's result does not depend on how many rows a call holds.
//
// To add a kernel: an entry here, its body in kernels/<name>.h, an include and a line in isa.inc, a NumPy twin in
// src/shoal/kernels/reference.py, tests/kernels/test_<name>.py and a line in docs/kernels.md.
#pragma once

#include <cstdint>

namespace shoal {

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
};

}  // namespace shoal
