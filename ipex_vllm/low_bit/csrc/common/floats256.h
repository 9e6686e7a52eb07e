// The 256-bit vectors of AVX2, FMA and F16C: floats in and out.
#pragma once

#include <immintrin.h>

namespace common {
namespace {

struct Floats256 {
    using F = __m256;
    static constexpr int lanes = 8;

    static F load_float(const void *p) { return _mm256_loadu_ps(static_cast<const float *>(p)); }
    static F load_half(const void *p) { return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i *>(p))); }
    static F load_bfloat16(const void *p) {
        const __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i *>(p)));
        return _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
    }
    static void store_float(void *p, F v) { _mm256_storeu_ps(static_cast<float *>(p), v); }
    static void store_half(void *p, F v) {
        _mm_storeu_si128(static_cast<__m128i *>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
    }
    static void store_bfloat16(void *p, F v) {
        const __m256i bits = _mm256_castps_si256(v);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
        const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
        const __m256i words = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan), 16);
        _mm_storeu_si128(static_cast<__m128i *>(p),
                         _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
    }
    static F constant(float value) { return _mm256_set1_ps(value); }
    static F add(F a, F b) { return _mm256_add_ps(a, b); }
    static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
};

} // namespace
} // namespace common
