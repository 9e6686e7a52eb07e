// 8-bit floats to 512-bit vectors of float32, with AVX-512 F, BW and VL.
#pragma once

#include "common/floats512.h"
#include "w8a16/kernel.h"

namespace w8a16 {
namespace {

struct Decode512 : common::Floats512 {
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
