// Checks one vector header, primitive by primitive, against plain arithmetic. Compiled once per instruction set with
// that set's flags, SHOAL_SIMD_HEADER naming the header; kernel_check.cpp calls the result where the machine has the
// set.
#include SHOAL_SIMD_HEADER

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include "simd/math.h"

#define SHOAL_STRING_(x) #x
#define SHOAL_STRING(x) SHOAL_STRING_(x)
#define SHOAL_JOIN_(a, b) a##b
#define SHOAL_JOIN(a, b) SHOAL_JOIN_(a, b)

namespace shoal::SHOAL_ISA {
namespace {

int failures = 0;

void expect(bool ok, const char* what, double at) {
    if (!ok) {
        if (++failures <= 10) {
            fprintf(stderr, "%s: %s is wrong at %.9g\n", SHOAL_STRING(SHOAL_ISA), what, at);
        }
    }
}

uint32_t bits_of(float x) { return __builtin_bit_cast(uint32_t, x); }
float float_of(uint32_t u) { return __builtin_bit_cast(float, u); }
bool same(float a, float b) { return bits_of(a) == bits_of(b) || (a != a && b != b); }
float lane0(F32 v) {
    float out = 0;
    store_n(&out, v, 1);
    return out;
}

// What a half means by its definition: sign, 5 bits of exponent, 10 of fraction.
float half_by_definition(uint32_t h) {
    const uint32_t exponent = (h >> 10) & 31, fraction = h & 1023;
    const float sign = h & 0x8000 ? -1.0f : 1.0f;
    if (exponent == 31) {
        return fraction ? __builtin_nanf("") : sign * __builtin_inff();
    }
    return exponent ? sign * __builtin_ldexpf(1024.0f + static_cast<float>(fraction), static_cast<int>(exponent) - 25)
                    : sign * __builtin_ldexpf(static_cast<float>(fraction), -24);
}

void check_memory() {
    for (int n = 1; n <= kLanes; ++n) {  // exact heap blocks, so that AddressSanitizer sees a step too far
        float* from = static_cast<float*>(malloc(sizeof(float) * static_cast<size_t>(n)));
        float* to = static_cast<float*>(malloc(sizeof(float) * static_cast<size_t>(n)));
        uint16_t* narrow = static_cast<uint16_t*>(malloc(sizeof(uint16_t) * static_cast<size_t>(n)));
        float all = 0;
        for (int i = 0; i < n; ++i) {
            all += from[i] = static_cast<float>(i + 1);
        }
        store_n(to, load_n(from, n), n);
        store_bf16_n(narrow, load_n(from, n), n);
        expect(sum(load_n(from, n)) == all && sum(load_bf16_n(narrow, n)) == all, "a partial load", n);
        for (int i = 0; i < n; ++i) {
            expect(to[i] == from[i], "store_n", n);
        }
        free(from);
        free(to);
        free(narrow);
    }
}

void check_lanes() {
    float a[kLanes], out[kLanes];
    for (int i = 0; i < kLanes; ++i) {
        a[i] = static_cast<float>((i * 7) % kLanes) - 3.0f;
    }
    float total = 0, top = a[0];
    for (int i = 0; i < kLanes; ++i) {
        total += a[i];
        top = a[i] > top ? a[i] : top;
    }
    const F32 v = load(a), two = set1(2.0f);
    expect(sum(v) == total, "sum", 0);
    expect(max_of(v) == top, "max_of", 0);
    store(out, select_lt(v, zero(), sub(mul(v, two), set1(1.0f)), div(add(v, two), set1(4.0f))));
    for (int i = 0; i < kLanes; ++i) {
        expect(out[i] == (a[i] < 0 ? a[i] * 2 - 1 : (a[i] + 2) / 4), "select_lt", a[i]);
    }
    store(out, fma(v, set1(3.0f), two));
    for (int i = 0; i < kLanes; ++i) {
        expect(out[i] == a[i] * 3 + 2, "fma", a[i]);
    }
    const float nan = __builtin_nanf("");
    expect(same(lane0(max(set1(nan), two)), 2.0f) && same(lane0(max(two, set1(nan))), nan), "max of NaN", 0);
    for (int n = -126; n <= 127; ++n) {
        expect(lane0(pow2(set1(static_cast<float>(n)))) == __builtin_ldexpf(1.0f, n), "pow2", n);
    }
}

void check_formats() {
    uint32_t state = 1;
    for (uint32_t h = 0; h < 65536; ++h) {
        expect(same(f16_to_f32(static_cast<uint16_t>(h)), half_by_definition(h)), "f16_to_f32", h);
        uint16_t in[kLanes] = {static_cast<uint16_t>(h)}, out[kLanes];
        expect(same(lane0(load_bf16(in)), float_of(h << 16)), "load_bf16", h);

        state = state * 1664525u + 1013904223u;
        const uint32_t low = h % 3 == 0 ? 0x8000 : state >> 16;  // a third of the cases are ties
        const float x = float_of(h << 16 | low);
        store_bf16(out, set1(x));
        if (x != x) {
            expect((out[0] & 0x7F80) == 0x7F80 && (out[0] & 0x7F), "store_bf16 of NaN", h);
        } else {
            const uint32_t up = low > 0x8000 || (low == 0x8000 && (h & 1));
            expect(out[0] == static_cast<uint16_t>(h + up), "store_bf16", static_cast<double>(x));
        }
    }
}

void check_codes() {
    for (int code = -127; code <= 127; ++code) {
        float in[kLanes];
        int8_t out[kLanes];
        for (int i = 0; i < kLanes; ++i) {  // ties among them
            in[i] = static_cast<float>((code + 127 + i) % 255 - 127) + (i % 3 == 2 ? 0.25f : i % 3 ? 0.0f : 0.5f);
            in[i] = in[i] > 127.0f ? 127.0f : in[i];
        }
        const I32 rounded = round_i32(load(in));
        store_codes(out, rounded);
        float back[kLanes], twice[kLanes];
        store(back, to_f32(load_codes(out)));
        store(twice, to_f32(iadd(rounded, rounded)));
        for (int i = 0; i < kLanes; ++i) {
            const float whole = __builtin_rintf(in[i]);
            expect(out[i] == whole && back[i] == whole && twice[i] == 2 * whole, "an int8 code", in[i]);
        }
    }
}

void check_dots() {
    int8_t a[kBytes], b[kBytes];
    for (int x = -128; x <= 127; ++x) {
        for (int y = -127; y <= 127; ++y) {
            int expected = 0;
            for (int i = 0; i < kBytes; ++i) {  // full range in the even places, its neighbours in the odd ones
                a[i] = static_cast<int8_t>(i % 2 ? -128 + ((x + 128 + i) & 255) : x);
                b[i] = static_cast<int8_t>(i % 2 ? -127 + ((y + 127 + i) % 255) : y);
                expected += a[i] * b[i];
            }
            const I32 once = dot_i8(izero(), load_i8(a), load_i8(b));
            expect(isum(dot_i8(once, load_i8(a), load_i8(b))) == 2 * expected, "dot_i8", x * 1000 + y);
        }
    }
    expect(sum(to_f32(dot_i8(izero(), load_i8(a), load_i8(a)))) ==
               static_cast<float>(isum(dot_i8(izero(), load_i8(a), load_i8(a)))),
           "to_f32", 0);

    uint16_t p[2 * kLanes], q[2 * kLanes];
    float expected = 0;
    for (int i = 0; i < 2 * kLanes; ++i) {  // small whole numbers: every order of summation is exact
        const float x = static_cast<float>(i - 5), y = static_cast<float>(3 - (i % 7));
        p[i] = static_cast<uint16_t>(bits_of(x) >> 16);
        q[i] = static_cast<uint16_t>(bits_of(y) >> 16);
        expected += x * y;
    }
    expect(sum(dot_bf16(zero(), p, q)) == expected, "dot_bf16", 0);
}

void check_exp() {
    double worst = 0;
    for (int step = -87000; step <= 88000; step += 3) {
        const float x = static_cast<float>(step) * 1e-3f;
        const double truth = __builtin_exp(static_cast<double>(x));
        const double error = __builtin_fabs(static_cast<double>(lane0(exp(set1(x)))) - truth) / truth;
        worst = error > worst ? error : worst;
    }
    expect(worst < 2.5e-7, "exp", worst);
    const float inf = __builtin_inff();
    expect(lane0(exp(set1(-inf))) == 0 && lane0(exp(set1(-1e30f))) == 0, "exp of a large negative", 0);
    expect(lane0(exp(set1(inf))) == inf && lane0(exp(set1(89.0f))) == inf, "exp of a large positive", 0);
    expect(lane0(exp(zero())) == 1.0f && same(lane0(exp(set1(__builtin_nanf("")))), __builtin_nanf("")), "exp", 0);
}

}  // namespace
}  // namespace shoal::SHOAL_ISA

extern "C" int SHOAL_JOIN(shoal_simd_check_, SHOAL_ISA)() {
    using namespace shoal::SHOAL_ISA;
    check_memory();
    check_lanes();
    check_formats();
    check_codes();
    check_dots();
    check_exp();
    return failures;
}
