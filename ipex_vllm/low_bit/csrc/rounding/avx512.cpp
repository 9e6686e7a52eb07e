// Compiled with AVX-512 F, BW and VL.
#include "common/floats512.h"
#include "rounding/kernel.h"

namespace rounding {
namespace {

struct Avx512 : common::Floats512 {
    static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
    static F min(F a, F b) { return _mm512_min_ps(a, b); }
    static F max(F a, F b) { return _mm512_max_ps(a, b); }
    static F floor(F v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
    static F nearest(F v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static F magnitude(F v) { return _mm512_abs_ps(v); }
    static F larger_bits(F a, F b) {
        return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
    }
    static F constant_of_largest_bits(F v) {
        return _mm512_castsi512_ps(_mm512_set1_epi32(_mm512_reduce_max_epi32(_mm512_castps_si512(v))));
    }
    static uint32_t equal_bits(F a, F b) {
        return _mm512_cmpeq_epi32_mask(_mm512_castps_si512(a), _mm512_castps_si512(b));
    }
    static float sum_block(const float *block) {
        const F all = load_float(block);
        const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(all), 1));
        const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(all), high);
        const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
        const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
    }
    static void store_bytes(uint8_t *p, F v) {
        _mm_storeu_si128(reinterpret_cast<__m128i *>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
    }
};

} // namespace

void round_avx512(const RoundingCall &c, int64_t begin, int64_t end, float *scratch) {
    round_any<Avx512>(c, begin, end, scratch);
}

} // namespace rounding
