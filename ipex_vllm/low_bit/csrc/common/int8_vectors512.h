// What the 512-bit vectors of AVX-512 F, BW, VL and VNNI do for integer weights.
#pragma once

#include <cstring>

#include "common/floats512.h"

namespace common {
namespace {

struct Int8Vectors512 : Floats512 {
    using I = __m512i;
    using Dot = __m512i;
    static constexpr int bytes = 64, slices = 1;
    static constexpr int max_rows = 7; // 14 int32 and 14 float32 accumulators, two codes, one activation: 31 of 32

    static I zero() { return _mm512_setzero_si512(); }
    static I set(int32_t value) { return _mm512_set1_epi32(value); }
    static I load_bytes(const void *p) { return _mm512_loadu_si512(p); }
    static I broadcast(const void *p) {
#ifdef __SANITIZE_ADDRESS__ // which does not see what assembly reads
        int32_t word;
        std::memcpy(&word, p, 4);
        return _mm512_set1_epi32(word);
#else
        // GCC loads the word early and broadcasts it from a register, which is one operation more.
        I words;
        asm("vpbroadcastd %1, %0" : "=v"(words) : "m"(*static_cast<const int32_t *>(p)));
        return words;
#endif
    }
    static Dot begin(I total) { return total; }
    static Dot dot(Dot sum, I codes, I quad) { return _mm512_dpbusd_epi32(sum, codes, quad); }
    static I end(I, Dot sum) { return sum; }

    static F broadcast_float(const float *p) { return _mm512_set1_ps(*p); }
    static F as_float(I v) { return _mm512_castsi512_ps(v); }
    static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static F add(F a, F b) { return _mm512_add_ps(a, b); }

    static I max_magnitude(I largest, F v) {
        return _mm512_max_epi32(largest, _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff)));
    }
    static float reduce_magnitude(I v) {
        const int32_t bits = _mm512_reduce_max_epi32(v);
        float value;
        std::memcpy(&value, &bits, 4);
        return value;
    }
    static I round(F v) { return _mm512_cvtps_epi32(v); }
    static I add(I a, I b) { return _mm512_add_epi32(a, b); }
    static int32_t reduce_add(I v) { return _mm512_reduce_add_epi32(v); }
    static void store_int8(void *p, I v) { _mm_storeu_si128(static_cast<__m128i *>(p), _mm512_cvtepi32_epi8(v)); }
};

} // namespace
} // namespace common
