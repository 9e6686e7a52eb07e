// Compiled with AVX-512 F, BW and VL.
#include "common/floats512.h"
#include "experts/kernel.h"

namespace experts {
namespace {

struct Avx512 : common::Floats512 {
    static F div(F a, F b) { return _mm512_div_ps(a, b); }
    // Of a NaN and a number the second is taken: a NaN stays one when it is the second.
    static F min(F a, F b) { return _mm512_min_ps(b, a); }
    static F max(F a, F b) { return _mm512_max_ps(b, a); }
    static F negate(F v) { return _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(v), sign_bits())); }
    static F with_sign_of(F v, F sign) {
        const __m512i bits = _mm512_and_si512(_mm512_castps_si512(sign), sign_bits());
        return _mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(v), bits));
    }
    static F scale_by_power_of_two(F v, F shifted) {
        const __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(shifted), 23);
        return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(v), exponent));
    }

  private:
    static __m512i sign_bits() { return _mm512_set1_epi32(INT32_MIN); }
};

} // namespace

const Vectors kAvx512Vectors{activate<Avx512>, combine<Avx512>};

} // namespace experts
