// Every kernel of every instruction set against the scalar table, without Python: for sanitizers and for emulators.
// Arrays lie in heap blocks of their exact size, at odd bytes, with gaps between rows that must stay as they were.
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "shoal/dispatch.h"
#include "tests/packed_check.h"
#include "tests/rows.h"

#define SHOAL_SIMD_CHECK(isa) extern "C" int shoal_simd_check_##isa();
SHOAL_SIMD_CHECK(scalar)
SHOAL_SIMD_CHECK(avx2)
SHOAL_SIMD_CHECK(avx512)
SHOAL_SIMD_CHECK(neon)

namespace {

using shoal::Ops;
using shoal::tests::kUntouched;
using shoal::tests::Rows;

struct SimdCheck {
    const char* isa;
    int (*run)();
};

constexpr SimdCheck kSimdChecks[] = {
#ifdef SHOAL_HAVE_AVX512
    {"avx512", shoal_simd_check_avx512},
#endif
#ifdef SHOAL_HAVE_AVX2
    {"avx2", shoal_simd_check_avx2},
#endif
#ifdef SHOAL_HAVE_NEON
    {"neon", shoal_simd_check_neon},
#endif
    {"scalar", shoal_simd_check_scalar},
};

struct Case {
    const char* name;
    void (*run)(const Ops& ops, Rows& x, Rows& other, Rows& y, int rows, int cols);
};

constexpr Case kCases[] = {
    {"rms_norm",
     [](const Ops& ops, Rows& x, Rows& other, Rows& y, int rows, int cols) {
         ops.rms_norm(x.data(), x.stride(), other.data(), 1e-5f, y.data(), y.stride(), rows, cols);
     }},
    {"softmax", [](const Ops& ops, Rows& x, Rows&, Rows& y, int rows,
                   int cols) { ops.softmax(x.data(), x.stride(), 0.7f, y.data(), y.stride(), rows, cols); }},
    {"silu_mul",
     [](const Ops& ops, Rows& x, Rows& other, Rows& y, int rows, int cols) {
         ops.silu_mul(x.data(), x.stride(), other.data(), other.stride(), y.data(), y.stride(), rows, cols);
     }},
};

bool agrees(const Rows& y, const Rows& truth) {
    for (size_t i = 0; i < y.size(); ++i) {
        const float a = y.get(i), b = truth.get(i);
        const bool ok = y.in_gap(i) ? a == kUntouched : std::fabs(a - b) <= 1e-6f + 4e-6f * std::fabs(b);
        if (!ok) {
            std::fprintf(stderr, "element %zu: %.9g, scalar %.9g\n", i, static_cast<double>(a), static_cast<double>(b));
            return false;
        }
    }
    return true;
}

bool check(const Case& kernel, const Ops& ops, const Ops& scalar, int rows, int cols) {
    Rows x(rows, cols), other(rows, cols), y(rows, cols), truth(rows, cols);
    x.fill(static_cast<uint32_t>(cols), 30.0f);
    other.fill(static_cast<uint32_t>(cols) + 1000u, 2.0f);
    kernel.run(scalar, x, other, truth, rows, cols);
    kernel.run(ops, x, other, y, rows, cols);
    const bool apart = agrees(y, truth);
    kernel.run(ops, x, other, x, rows, cols);  // in place
    const bool in_place = agrees(x, truth);
    if (!apart || !in_place) {
        std::fprintf(stderr, "%s on %s, %d x %d: %s differs\n", kernel.name, ops.isa, rows, cols,
                     apart ? "in place" : "y");
    }
    return apart && in_place;
}

}  // namespace

int main() {
    const std::vector<const Ops*> tables = shoal::available_isas();
    int passed = 0, failed = 0;
    for (const Ops* ops : tables) {
        for (const SimdCheck& simd : kSimdChecks) {
            if (std::string(simd.isa) == ops->isa) {
                const int wrong = simd.run();
                std::printf("%-8s vector header %s\n", ops->isa, wrong ? "FAILED" : "ok");
                ++(wrong ? failed : passed);
            }
        }
        for (const Case& kernel : kCases) {
            bool ok = true;
            for (int cols = 1; cols <= 131; ++cols) {
                ok = ok && check(kernel, *ops, *tables.back(), cols % 4, cols);
            }
            ok = ok && check(kernel, *ops, *tables.back(), 2, 4099);
            std::printf("%-8s %s %s\n", ops->isa, kernel.name, ok ? "ok" : "FAILED");
            ++(ok ? passed : failed);
        }
        for (const shoal::tests::PackedCase& kernel : shoal::tests::packed_cases()) {
            const bool ok = kernel.run(*ops, *tables.back());
            std::printf("%-8s %s %s\n", ops->isa, kernel.name, ok ? "ok" : "FAILED");
            ++(ok ? passed : failed);
        }
        failed += !shoal::select_isa(ops->isa) || &shoal::ops() != ops;
    }
    failed += shoal::select_isa("no such thing");
    std::printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
