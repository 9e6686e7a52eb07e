// Compiled with AVX2, FMA and F16C.
#include "common/floats256.h"
#include "experts/kernel.h"

namespace experts {
namespace {

struct Avx2 : common::Floats256 {
    static F div(F a, F b) { return _mm256_div_ps(a, b); }
    // Of a NaN and a number the second is taken: a NaN stays one when it is the second.
    static F min(F a, F b) { return _mm256_min_ps(b, a); }
    static F max(F a, F b) { return _mm256_max_ps(b, a); }
    static F negate(F v) { return _mm256_xor_ps(v, _mm256_set1_ps(-0.0f)); }
    static F with_sign_of(F v, F sign) { return _mm256_or_ps(v, _mm256_and_ps(sign, _mm256_set1_ps(-0.0f))); }
    static F scale_by_power_of_two(F v, F shifted) {
        const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
        return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(v), exponent));
    }
};

} // namespace

const Vectors kAvx2Vectors{activate<Avx2>, combine<Avx2>};

} // namespace experts
