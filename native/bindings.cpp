// The Python module: checks shapes and strides, lets go of the GIL, calls the table in force. Arrays come in without
// conversion (.noconvert()), so that nothing is copied unseen; shoal/kernels/__init__.py makes them fit.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <vector>

#include "bindings_packed.h"
#include "engine/bindings_engine.h"
#include "engine/bindings_weights.h"
#include "shoal/dispatch.h"

namespace nb = nanobind;
using nb::literals::operator""_a;

namespace {

using InRows = nb::ndarray<const float, nb::ndim<2>, nb::device::cpu>;
using OutRows = nb::ndarray<float, nb::ndim<2>, nb::device::cpu>;
using InVector = nb::ndarray<const float, nb::ndim<1>, nb::device::cpu>;

void require(bool condition, const char* problem) {
    if (!condition) {
        throw nb::value_error(problem);
    }
}

template <class Array>
bool contiguous_last(const Array& a) {
    return a.size() == 0 || a.shape(a.ndim() - 1) == 1 || a.stride(a.ndim() - 1) == 1;
}

void require_rows(const InRows& in, const OutRows& out) {
    require(in.shape(0) == out.shape(0) && in.shape(1) == out.shape(1), "arrays differ in shape");
    require(contiguous_last(in) && contiguous_last(out), "elements of a row must be contiguous");
}

int64_t rows_of(const OutRows& y) { return static_cast<int64_t>(y.shape(0)); }
int64_t cols_of(const OutRows& y) { return static_cast<int64_t>(y.shape(1)); }

void rms_norm(const InRows& x, const InVector& weight, float eps, const OutRows& y) {
    require_rows(x, y);
    require(weight.shape(0) == x.shape(1) && contiguous_last(weight), "weight must be contiguous, one value a column");
    nb::gil_scoped_release unlocked;
    shoal::ops().rms_norm(x.data(), x.stride(0), weight.data(), eps, y.data(), y.stride(0), rows_of(y), cols_of(y));
}

void softmax(const InRows& x, float scale, const OutRows& y) {
    require_rows(x, y);
    nb::gil_scoped_release unlocked;
    shoal::ops().softmax(x.data(), x.stride(0), scale, y.data(), y.stride(0), rows_of(y), cols_of(y));
}

void silu_mul(const InRows& gate, const InRows& up, const OutRows& y) {
    require_rows(gate, y);
    require_rows(up, y);
    nb::gil_scoped_release unlocked;
    shoal::ops().silu_mul(gate.data(), gate.stride(0), up.data(), up.stride(0), y.data(), y.stride(0), rows_of(y),
                          cols_of(y));
}

std::vector<std::string> available_isas() {
    std::vector<std::string> names;
    for (const shoal::Ops* table : shoal::available_isas()) {
        names.emplace_back(table->isa);
    }
    return names;
}

}  // namespace

NB_MODULE(_native, m) {
    m.doc() = "CPU kernels of Shoal; see shoal.kernels for the public face.";
    shoal_bind_weights(m);
    shoal_bind_engine(m);
    shoal_bind_packed(m);
    m.def("available_isas", &available_isas);
    m.def("selected_isa", [] { return std::string(shoal::ops().isa); });
    m.def("select_isa", [](const std::string& name) { return shoal::select_isa(name); }, "name"_a);
    m.def("rms_norm", &rms_norm, "x"_a.noconvert(), "weight"_a.noconvert(), "eps"_a, "y"_a.noconvert());
    m.def("softmax", &softmax, "x"_a.noconvert(), "scale"_a, "y"_a.noconvert());
    m.def("silu_mul", &silu_mul, "gate"_a.noconvert(), "up"_a.noconvert(), "y"_a.noconvert());
}
