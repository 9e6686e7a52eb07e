// The 256-bit vectors of AVX2; D multiplies codes by activations, which AVX-VNNI does in one instruction.
#pragma once

#include <immintrin.h>

#include "kernel.h"

namespace w4a8 {
namespace {

template <class D> struct Vector256 : D {
    using I = __m256i;
    using F = __m256;
    static constexpr int lanes = 8, bytes = 32, slices = 2;
    static constexpr int high_factor = 1; // sums of 16 bits have no room for high nibbles where they stand

    static I zero() { return _mm256_setzero_si256(); }
    static I load_bytes(const void *p) { return _mm256_loadu_si256(static_cast<const __m256i *>(p)); }
    static I low_nibbles(I v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
    static I high_nibbles(I v) { return low_nibbles(_mm256_srli_epi16(v, 4)); }
    static I broadcast(const void *p) {
        int32_t word;
        std::memcpy(&word, p, 4);
        return _mm256_set1_epi32(word);
    }

    static F load_float(const void *p) { return _mm256_loadu_ps(static_cast<const float *>(p)); }
    static F load_half(const void *p) { return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i *>(p))); }
    static F load_bfloat16(const void *p) {
        const I words = _mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i *>(p)));
        return _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
    }
    static void store_float(void *p, F v) { _mm256_storeu_ps(static_cast<float *>(p), v); }
    static void store_half(void *p, F v) {
        _mm_storeu_si128(static_cast<__m128i *>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
    }
    static void store_bfloat16(void *p, F v) {
        const I bits = _mm256_castps_si256(v);
        const I odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const I rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
        const I nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
        const I words = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan), 16);
        _mm_storeu_si128(static_cast<__m128i *>(p),
                         _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
    }
    static F broadcast_float(const void *p) { return _mm256_castsi256_ps(broadcast(p)); }
    static F to_float(I v) { return _mm256_cvtepi32_ps(v); }
    static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }

    static I max_magnitude(I largest, F v) {
        return _mm256_max_epi32(largest, _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7fffffff)));
    }
    static float reduce_magnitude(I v) {
        __m128i m = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
        m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
        m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1));
        return _mm_cvtss_f32(_mm_castsi128_ps(m));
    }
    static I round(F v) { return _mm256_cvtps_epi32(v); }
    static I add(I a, I b) { return _mm256_add_epi32(a, b); }
    static int32_t reduce_add(I v) {
        __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
        s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
        s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1));
        return _mm_cvtsi128_si32(s);
    }
    static void store_int8(void *p, I v) {
        const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
        _mm_storel_epi64(static_cast<__m128i *>(p), _mm_packs_epi16(words, words));
    }
};

} // namespace
} // namespace w4a8
