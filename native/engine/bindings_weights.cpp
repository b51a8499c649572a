// Packing for Python: bytes of a file in, tiles of a packed matrix out.
#include "engine/bindings_weights.h"

#include <nanobind/stl/optional.h>

#include <algorithm>
#include <optional>
#include <utility>

#include "engine/bandwidth.h"
#include "engine/pack.h"

namespace nb = nanobind;
using nb::literals::operator""_a;

namespace {

using shoal::Packing;
using OutBytes = nb::ndarray<uint8_t, nb::c_contig, nb::device::cpu>;

size_t packed_bytes(int packing, long rows, long cols) {
    require(packing >= 0 && packing < shoal::kPackings && rows > 0 && cols > 0, "no such packing or an empty matrix");
    return shoal::PackedMatrix{Packing(packing), rows, cols, nullptr}.bytes();
}

Packed make_packed(int packing, long rows, long cols, Bytes memory, long count) {
    require(count > 0 && memory.size() == packed_bytes(packing, rows, cols) * count, "memory does not fit the matrix");
    return {{Packing(packing), rows, cols, memory.data()}, count, std::move(memory)};
}

// Bytes of a row of `cols` columns, 0 where the kind stores whole blocks and the row is none.
long row_bytes_of(shoal::Source kind, long cols) {
    auto blocks = [&](long columns, long bytes) { return cols % columns ? 0 : cols / columns * bytes; };
    switch (kind) {
        case shoal::Source::f32:
            return 4 * cols;
        case shoal::Source::bf16:
        case shoal::Source::f16:
            return 2 * cols;
        case shoal::Source::q8_0:
            return blocks(32, 34);
        case shoal::Source::q4_0:
            return blocks(32, 18);
        case shoal::Source::q4_1:
            return blocks(32, 20);
        case shoal::Source::q4_k:
            return blocks(256, 144);
        case shoal::Source::codes:
            return cols;
    }
    return 0;
}

// Whether int8 codes lie in the packing's range: -128..127, -8..7, or 0..15 with minima.
bool codes_fit(const Bytes& codes, Packing packing) {
    const int low = packing == Packing::q8 ? -128 : packing == Packing::q4 ? -8 : 0;
    const int high = packing == Packing::q8 ? 127 : packing == Packing::q4 ? 7 : 15;
    return std::all_of(codes.data(), codes.data() + codes.size(),
                       [&](uint8_t code) { return int8_t(code) >= low && int8_t(code) <= high; });
}

void pack(int source, Bytes data, long rows, long cols, int packing, OutBytes out, int threads,
          std::optional<Floats> scales, std::optional<Floats> minima, long group) {
    const auto kind = shoal::Source(source);
    require(shoal::can_pack(kind, Packing(packing)), "these weights do not go into that packing");
    require(out.size() == packed_bytes(packing, rows, cols), "out does not fit the matrix");
    require(data.ndim() == 2 && long(data.shape(0)) == rows, "data must hold the rows' bytes");
    const long row_bytes = long(data.shape(1));
    require(row_bytes > 0 && row_bytes == row_bytes_of(kind, cols), "rows have the wrong number of bytes");
    shoal::SourceRows from{kind, data.data(), row_bytes};
    if (kind == shoal::Source::codes) {
        require(group > 0 && group % 32 == 0, "a group is a multiple of 32 columns");
        const size_t groups = size_t(rows) * ((cols + group - 1) / group);
        require(scales && scales->size() == groups && (!minima || minima->size() == groups),
                "one scale a group and row");
        require(!minima || packing == int(Packing::q4m), "minima go into q4m alone");
        require(codes_fit(data, Packing(packing)), "a code is out of the packing's range");
        from.scales = scales->data();
        from.minima = minima ? minima->data() : nullptr;
        from.group = group;
    }
    nb::gil_scoped_release unlocked;
    shoal::pack_rows(from, rows, cols, Packing(packing), out.data(), threads);
}

// Row `row` of the stack's matrices laid end to end.
void unpack(const Packed& packed, long row, nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu> out) {
    shoal::PackedMatrix matrix = packed.matrix;
    require(row >= 0 && row < matrix.rows * packed.count && long(out.size()) == matrix.cols, "no such row");
    matrix.data += row / matrix.rows * matrix.bytes();
    shoal::unpack_row(matrix, row % matrix.rows, out.data());
}

double read_bandwidth(int threads, size_t bytes, int passes) {
    require(threads > 0 && bytes > 0 && passes > 0, "threads, bytes and passes must be positive");
    nb::gil_scoped_release unlocked;
    return shoal::read_bandwidth(threads, bytes, passes);
}

}  // namespace

void shoal_bind_weights(nb::module_& m) {
    nb::class_<Packed>(m, "Packed")
        .def(
            "__init__",
            [](Packed* self, int packing, long rows, long cols, Bytes memory, long count) {
                new (self) Packed(make_packed(packing, rows, cols, std::move(memory), count));
            },
            "packing"_a, "rows"_a, "cols"_a, "memory"_a.noconvert(), "count"_a = 1)
        .def_prop_ro("rows", [](const Packed& p) { return p.matrix.rows; })
        .def_prop_ro("cols", [](const Packed& p) { return p.matrix.cols; })
        .def_prop_ro("count", [](const Packed& p) { return p.count; })
        .def_prop_ro("packing", [](const Packed& p) { return int(p.matrix.packing); })
        .def_prop_ro("nbytes", [](const Packed& p) { return p.matrix.bytes() * p.count; })
        .def("row", &unpack, "row"_a, "out"_a.noconvert());
    m.def("packed_bytes", &packed_bytes, "packing"_a, "rows"_a, "cols"_a);
    m.def("pack", &pack, "source"_a, "data"_a.noconvert(), "rows"_a, "cols"_a, "packing"_a, "out"_a.noconvert(),
          "threads"_a = 1, "scales"_a.noconvert() = nb::none(), "minima"_a.noconvert() = nb::none(), "group"_a = 32);
    m.def("read_bandwidth", &read_bandwidth, "threads"_a, "bytes"_a, "passes"_a);
}
