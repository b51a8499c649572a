// The kernels of packed weights, checked: for the tests and for shoal.kernels.packed. The executor calls the table
// itself.
#include "bindings_packed.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <optional>
#include <vector>

#include "shoal/dispatch.h"

namespace nb = nanobind;
using nb::literals::operator""_a;

namespace {

using shoal::kBlockCols;
using shoal::kGroup;
using shoal::kTileRows;
using shoal::Packing;

template <class T, int Dims>
using Dense = nb::ndarray<T, nb::ndim<Dims>, nb::c_contig, nb::device::cpu>;
template <class T>
using Strided = nb::ndarray<T, nb::ndim<2>, nb::device::cpu>;

void require(bool condition, const char* problem) {
    if (!condition) {
        throw nb::value_error(problem);
    }
}

template <class Array>
int64_t size_at(const Array& a, size_t axis) {
    return static_cast<int64_t>(a.shape(axis));
}

template <class Array>
void require_rows(const Array& a) {
    require(a.size() == 0 || a.shape(1) == 1 || a.stride(1) == 1, "elements of a row must be contiguous");
}

// The three arrays of shoal::QuantRows for `rows` rows of `cols` columns; returns the lanes.
template <class Codes, class Scales, class Sums>
int64_t require_quant(const Codes& codes, const Scales& scales, const Sums& sums, int64_t rows, int64_t cols) {
    const int64_t padded = shoal::round_up(cols, kBlockCols), lanes = size_at(codes, 2);
    require(lanes == 1 || lanes == 4, "lanes must be 1 or 4");
    const int64_t blocks = (rows + lanes - 1) / lanes;
    require(size_at(codes, 0) == blocks && size_at(codes, 1) == padded / 4 && codes.shape(3) == 4,
            "codes must be [blocks of lanes, padded columns / 4, lanes, 4]");
    for (size_t axis = 0; axis < 3; ++axis) {
        const int64_t expected = axis == 0 ? blocks : axis == 1 ? padded / kGroup : lanes;
        require(size_at(scales, axis) == expected && size_at(sums, axis) == expected,
                "scales and sums must be [blocks of lanes, padded columns / 32, lanes]");
    }
    return lanes;
}

// Tiles that hold `rows` x `cols` in one of the packings from `first` to `last`; returns how many.
int64_t require_tiles(int packing, Packing first, Packing last, const Dense<const uint8_t, 1>& tiles, int64_t rows,
                      int64_t cols) {
    require(packing >= static_cast<int>(first) && packing <= static_cast<int>(last), "a packing of the other kernel");
    const shoal::PackedMatrix matrix{static_cast<Packing>(packing), static_cast<long>(rows), static_cast<long>(cols),
                                     tiles.data()};
    require(tiles.size() == matrix.bytes(), "tiles do not fit the rows and columns");
    return matrix.tiles();
}

void quantize_rows(const Strided<const float>& x, const Dense<int8_t, 4>& codes, const Dense<float, 3>& scales,
                   const Dense<int32_t, 3>& sums, const std::optional<Dense<float, 2>>& rest) {
    require_rows(x);
    const int64_t rows = size_at(x, 0), cols = size_at(x, 1), lanes = require_quant(codes, scales, sums, rows, cols);
    require(!rest || (size_at(*rest, 0) == rows && size_at(*rest, 1) == cols), "rest must have the shape of x");
    std::vector<const float*> pointers(static_cast<size_t>(rows));
    for (int64_t row = 0; row < rows; ++row) {
        pointers[static_cast<size_t>(row)] = x.data() + row * x.stride(0);
    }
    nb::gil_scoped_release unlocked;
    shoal::ops().quantize_rows(pointers.data(), rows, cols, lanes, codes.data(), scales.data(), sums.data(),
                               rest ? rest->data() : nullptr);
}

void matmul_q(int packing, const Dense<const uint8_t, 1>& tiles, int64_t cols, const Dense<const int8_t, 4>& codes,
              const Dense<const float, 3>& scales, const Dense<const int32_t, 3>& sums, const Strided<float>& y,
              bool add_to) {
    require_rows(y);
    const int64_t tokens = size_at(y, 0), rows = size_at(y, 1);
    const int64_t count = require_tiles(packing, Packing::q8, Packing::q4m, tiles, rows, cols);
    const int64_t lanes = require_quant(codes, scales, sums, tokens, cols);
    const shoal::QuantRows x{codes.data(), scales.data(), sums.data()};
    nb::gil_scoped_release unlocked;
    shoal::ops().matmul_q(packing, tiles.data(), count, cols, rows, &x, tokens, lanes, y.data(), y.stride(0), add_to);
}

void matmul_f(int packing, const Dense<const uint8_t, 1>& tiles, const Strided<const float>& x, const Strided<float>& y,
              bool add_to) {
    require_rows(x);
    require_rows(y);
    const int64_t tokens = size_at(y, 0), rows = size_at(y, 1), cols = size_at(x, 1);
    require(size_at(x, 0) == tokens, "x and y differ in rows");
    const int64_t count = require_tiles(packing, Packing::f32, Packing::bf16, tiles, rows, cols);
    nb::gil_scoped_release unlocked;
    shoal::ops().matmul_f(packing, tiles.data(), count, cols, rows, x.data(), x.stride(0), tokens, y.data(),
                          y.stride(0), add_to);
}

void widen_rows(const Dense<const uint8_t, 2>& x, int64_t scales_at, const Dense<uint16_t, 2>& y) {
    const int64_t rows = size_at(y, 0), width = size_at(y, 1);
    require(size_at(x, 0) == rows, "x and y differ in rows");
    require(scales_at >= width && size_at(x, 1) == scales_at + 4 * ((width + 63) / 64),
            "a row must hold its codes and a scale for every 64 of them");
    nb::gil_scoped_release unlocked;
    shoal::ops().widen_rows(x.data(), size_at(x, 1), scales_at, rows, width, y.data());
}

using Halves = Dense<const uint16_t, 2>;

void lora_shrink(const Strided<const float>& x, const Halves& a, float scale, const Dense<float, 2>& low) {
    require_rows(x);
    require(a.shape(1) == x.shape(1), "x and a differ in columns");
    require(low.shape(0) == x.shape(0) && low.shape(1) == a.shape(0), "low must be [rows of x, rows of a]");
    nb::gil_scoped_release unlocked;
    shoal::ops().lora_shrink(x.data(), x.stride(0), size_at(x, 0), size_at(x, 1), a.data(), size_at(a, 0), scale,
                             low.data(), size_at(low, 1));
}

void lora_expand(const Dense<const float, 2>& low, const Strided<const uint16_t>& b, const Strided<float>& y) {
    require_rows(b);
    require_rows(y);
    require(low.shape(0) == y.shape(0) && low.shape(1) == b.shape(0), "low must be [rows of y, rows of b]");
    require(b.shape(1) == y.shape(1), "b and y differ in columns");
    nb::gil_scoped_release unlocked;
    shoal::ops().lora_expand(low.data(), size_at(low, 1), size_at(y, 0), size_at(b, 0), b.data(), b.stride(0),
                             size_at(y, 1), y.data(), y.stride(0));
}

void narrow_rows(const Strided<const float>& x, float scale, const Strided<uint16_t>& y) {
    require_rows(x);
    require_rows(y);
    require(x.shape(0) == y.shape(0) && x.shape(1) == y.shape(1), "x and y differ in shape");
    nb::gil_scoped_release unlocked;
    shoal::ops().narrow_rows(x.data(), x.stride(0), scale, y.data(), y.stride(0), size_at(x, 0), size_at(x, 1));
}

// T is float, or uint16_t for bf16. queries: f32 [K, 16], or bf16 [K / 2, 16, 2] or [K / 4, 8, 4], 32 numbers to a row.
template <class T>
void attend(const Dense<const T, 2>& queries, const Strided<const T>& keys, const Strided<const T>& values,
            const Dense<const int32_t, 1>& last_key, int64_t first_key, const Dense<float, 1>& top,
            const Dense<float, 1>& total, const Dense<float, 2>& out) {
    constexpr bool bf16 = sizeof(T) == 2;
    require_rows(keys);
    require_rows(values);
    const int64_t key_width = size_at(keys, 1), num_keys = size_at(keys, 0), num_queries = size_at(out, 0);
    require(!bf16 || key_width % 2 == 0, "bf16 keys must have an even width");
    const int lanes = shoal::query_lanes(bf16, num_queries, key_width);
    require(size_at(queries, 0) * size_at(queries, 1) == key_width * lanes && queries.shape(1) == (bf16 ? 32 : 16),
            "queries do not fit the keys");
    require(num_keys <= 64 && size_at(values, 0) == num_keys, "at most 64 keys, and as many values");
    require(num_queries <= 16 && out.shape(1) == values.shape(1), "out must be [at most 16 queries, value width]");
    require(last_key.size() == 16 && top.size() == 16 && total.size() == 16, "last_key, top and total have 16 lanes");
    const shoal::AttendRun run{bf16,
                               queries.data(),
                               static_cast<int>(num_queries),
                               lanes,
                               keys.data(),
                               values.data(),
                               keys.stride(0),
                               values.stride(0),
                               key_width,
                               size_at(values, 1),
                               num_keys,
                               first_key,
                               last_key.data()};
    nb::gil_scoped_release unlocked;
    shoal::ops().attend(&run, top.data(), total.data(), out.data());
}

template <class T>
void bind_attend(nb::module_& m, const char* name) {
    m.def(name, &attend<T>, "queries"_a.noconvert(), "keys"_a.noconvert(), "values"_a.noconvert(),
          "last_key"_a.noconvert(), "first_key"_a, "top"_a.noconvert(), "total"_a.noconvert(), "out"_a.noconvert());
}

}  // namespace

void shoal_bind_packed(nb::module_& m) {
    m.def("quantize_rows", &quantize_rows, "x"_a.noconvert(), "codes"_a.noconvert(), "scales"_a.noconvert(),
          "sums"_a.noconvert(), "rest"_a.noconvert() = nb::none());
    m.def("matmul_q", &matmul_q, "packing"_a, "tiles"_a.noconvert(), "cols"_a, "codes"_a.noconvert(),
          "scales"_a.noconvert(), "sums"_a.noconvert(), "y"_a.noconvert(), "add_to"_a = false);
    m.def("matmul_f", &matmul_f, "packing"_a, "tiles"_a.noconvert(), "x"_a.noconvert(), "y"_a.noconvert(),
          "add_to"_a = false);
    m.def("lora_shrink", &lora_shrink, "x"_a.noconvert(), "a"_a.noconvert(), "scale"_a, "low"_a.noconvert());
    m.def("lora_expand", &lora_expand, "low"_a.noconvert(), "b"_a.noconvert(), "y"_a.noconvert());
    m.def("narrow_rows", &narrow_rows, "x"_a.noconvert(), "scale"_a, "y"_a.noconvert());
    m.def("widen_rows", &widen_rows, "x"_a.noconvert(), "scales_at"_a, "y"_a.noconvert());
    bind_attend<float>(m, "attend_f32");
    bind_attend<uint16_t>(m, "attend_bf16");
}
