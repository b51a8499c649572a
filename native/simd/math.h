// Elementary functions written once over the vector headers.
#pragma once

namespace shoal::SHOAL_ISA {
namespace {

// e^x to about 2 units in the last place, after Cephes' expf: x = n ln 2 + r, a polynomial in r, then 2^n.
// 0 below -87.33 (results that would be subnormal) and infinity above 88.37; NaN stays NaN.
SHOAL_INLINE F32 exp(F32 x) {
    const F32 lowest = set1(-87.336544f), highest = set1(88.37f);
    const F32 low = max(lowest, x);  // in this order a NaN survives
    const F32 t = select_lt(highest, low, highest, low);

    const F32 round = set1(12582912.0f);  // 1.5 * 2^23: adding it leaves no fraction bits
    const F32 n = sub(fma(t, set1(1.44269504088896341f), round), round);
    const F32 r = fma(n, set1(2.12194440e-4f), fma(n, set1(-0.693359375f), t));  // ln 2 in two parts

    F32 p = set1(1.9875691500e-4f);
    p = fma(p, r, set1(1.3981999507e-3f));
    p = fma(p, r, set1(8.3334519073e-3f));
    p = fma(p, r, set1(4.1665795894e-2f));
    p = fma(p, r, set1(1.6666665459e-1f));
    p = fma(p, r, set1(5.0000001201e-1f));
    const F32 e_r = add(fma(mul(r, r), p, r), set1(1.0f));

    const F32 value = mul(e_r, pow2(n));
    const F32 no_underflow = select_lt(x, lowest, zero(), value);
    return select_lt(highest, x, set1(__builtin_inff()), no_underflow);
}

}  // namespace
}  // namespace shoal::SHOAL_ISA
