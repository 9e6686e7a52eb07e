// Compiled with AVX-512 F, BW, VL and VNNI.
#include "common/floats512.h"
#include "w4a8/kernel.h"

namespace w4a8 {
namespace {

struct Avx512Vnni : common::Floats512 {
    using I = __m512i;
    using Dot = __m512i;
    static constexpr int bytes = 64, slices = 1;
    static constexpr int max_rows = 7; // 14 int32 and 14 float32 accumulators, two codes, one activation: 31 of 32
    static constexpr int high_factor = 16; // a high nibble is multiplied where it stands, which saves a shift

    static I zero() { return _mm512_setzero_si512(); }
    static I load_bytes(const void *p) { return _mm512_loadu_si512(p); }
    static I low_nibbles(I v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
    static I high_nibbles(I v) { return _mm512_and_si512(v, _mm512_set1_epi8(-16)); }
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

    static F broadcast_float(const void *p) { return _mm512_castsi512_ps(broadcast(p)); }
    static F to_float(I v) { return _mm512_cvtepi32_ps(v); }
    static F mul(F a, F b) { return _mm512_mul_ps(a, b); }

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
    static void store_int8(void *p, I v) {
        _mm_storeu_si128(static_cast<__m128i *>(p), _mm512_cvtepi32_epi8(v));
    }
};

} // namespace

const Kernel kAvx512VnniKernel{quantize<Avx512Vnni>, multiply<Avx512Vnni>};

} // namespace w4a8
