// What the 256-bit vectors of AVX2 do for integer weights; D multiplies codes by activations.
#pragma once

#include <cstring>

#include "common/floats256.h"

namespace common {
namespace {

template <class D> struct Int8Vectors256 : D, Floats256 {
    using I = __m256i;
    static constexpr int bytes = 32, slices = 2;

    static I zero() { return _mm256_setzero_si256(); }
    static I load_bytes(const void *p) { return _mm256_loadu_si256(static_cast<const __m256i *>(p)); }
    static I broadcast(const void *p) {
        int32_t word;
        std::memcpy(&word, p, 4);
        return _mm256_set1_epi32(word);
    }
    static F broadcast_float(const float *p) { return _mm256_broadcast_ss(p); }
    static F as_float(I v) { return _mm256_castsi256_ps(v); }
    static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
    static F add(F a, F b) { return _mm256_add_ps(a, b); }

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
} // namespace common
