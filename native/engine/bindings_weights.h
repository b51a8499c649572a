// Packed weights as Python holds them.
#pragma once
#include <nanobind/ndarray.h>

#include "shoal/packed.h"

using Bytes = nanobind::ndarray<const uint8_t, nanobind::c_contig, nanobind::device::cpu>;
using Floats = nanobind::ndarray<const float, nanobind::c_contig, nanobind::device::cpu>;

inline void require(bool condition, const char* problem) {
    if (!condition) throw nanobind::value_error(problem);
}

// A packed matrix, or a stack of equal ones; shares the array's memory.
struct Packed {
    shoal::PackedMatrix matrix;
    long count;
    Bytes memory;
};

void shoal_bind_weights(nanobind::module_& m);
