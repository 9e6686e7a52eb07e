// The 512-bit vectors of AVX-512 F, BW and VL: floats in and out.
#pragma once

#include <immintrin.h>

namespace common {
namespace {

struct Floats512 {
    using F = __m512;
    static constexpr int lanes = 16;

    static F load_float(const void *p) { return _mm512_loadu_ps(p); }
    static F load_half(const void *p) { return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i *>(p))); }
    static F load_bfloat16(const void *p) {
        const __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i *>(p)));
        return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
    }
    static void store_float(void *p, F v) { _mm512_storeu_ps(p, v); }
    static void store_half(void *p, F v) {
        _mm256_storeu_si256(static_cast<__m256i *>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
    }
    static void store_bfloat16(void *p, F v) {
        const __m512i bits = _mm512_castps_si512(v);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
        const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
        rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
        _mm256_storeu_si256(static_cast<__m256i *>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
    }
    static F constant(float value) { return _mm512_set1_ps(value); }
    static F add(F a, F b) { return _mm512_add_ps(a, b); }
    static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
};

} // namespace
} // namespace common
