// The 512-bit vectors of AVX-512 F, BW and VL.
#pragma once

#include <immintrin.h>

#include "w8a16_kernel.h"

namespace w8a16 {
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
    static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }

    // A line as four vectors of numbers: each holds the two inputs of eight outputs, side by side.
    template <Format E> static void decode_floats(const uint8_t *line, F *numbers) {
        const __m512i high = _mm512_loadu_si512(line), low = _mm512_slli_epi16(high, 8);
        to_floats(halves<E>(low), numbers);
        to_floats(halves<E>(high), numbers + 2);
    }

  private:
    // The float16 whose bits begin with the upper byte of each word. An e4m3 code has one bit of exponent less: it is
    // moved by one, and its number becomes 2^-8 of what it was, since the biases are 7 and 15.
    template <Format E> static __m512i halves(__m512i words) {
        if (E == kE5M2) return _mm512_and_si512(words, _mm512_set1_epi16(short(0xff00)));
        return _mm512_and_si512(_mm512_srai_epi16(words, 1), _mm512_set1_epi16(short(0xbf80)));
    }
    static void to_floats(__m512i halves, F *numbers) {
        numbers[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(halves));
        numbers[1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1));
    }
};

} // namespace
} // namespace w8a16
