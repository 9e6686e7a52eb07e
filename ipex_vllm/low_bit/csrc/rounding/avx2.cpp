// Compiled with AVX2, FMA and F16C.
#include "common/floats256.h"
#include "rounding/kernel.h"

namespace rounding {
namespace {

struct Avx2 : common::Floats256 {
    static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
    static F min(F a, F b) { return _mm256_min_ps(a, b); }
    static F max(F a, F b) { return _mm256_max_ps(a, b); }
    static F floor(F v) { return _mm256_floor_ps(v); }
    static F nearest(F v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static F magnitude(F v) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v); }
    static F larger_bits(F a, F b) {
        return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(a), _mm256_castps_si256(b)));
    }
    static F constant_of_largest_bits(F v) {
        v = larger_bits(v, _mm256_permute2f128_ps(v, v, 1));
        v = larger_bits(v, _mm256_permute_ps(v, 0x4e));
        return larger_bits(v, _mm256_permute_ps(v, 0xb1));
    }
    static uint32_t equal_bits(F a, F b) {
        const __m256i equal = _mm256_cmpeq_epi32(_mm256_castps_si256(a), _mm256_castps_si256(b));
        return _mm256_movemask_ps(_mm256_castsi256_ps(equal));
    }
    static float sum_block(const float *block) {
        const F eight = add(load_float(block), load_float(block + lanes));
        const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
        const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
    }
    static void store_bytes(uint8_t *p, F v) {
        const __m256i words = _mm256_cvtps_epi32(v);
        const __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
        _mm_storel_epi64(reinterpret_cast<__m128i *>(p), _mm_packs_epi16(halves, halves));
    }
};

} // namespace

void round_avx2(const RoundingCall &c, int64_t begin, int64_t end, float *scratch) {
    round_any<Avx2>(c, begin, end, scratch);
}

} // namespace rounding
