// Compiled with AVX-512 F, BW and VL.
#include "common/floats512.h"
#include "w16a16/kernel.h"

namespace w16a16 {
namespace {

struct Avx512 : common::Floats512 {
    static constexpr int vectors = 2, max_rows = 12; // 24 sums, two vectors of numbers, one value, one mask: 28 of 32
    static constexpr int few_rows = 1;

    // The low or the high words of sixteen pairs, as the upper halves of floats.
    static F upper_halves(const uint8_t *pairs, int high) {
        const __m512i words = _mm512_loadu_si512(pairs);
        return _mm512_castsi512_ps(high ? _mm512_and_si512(words, _mm512_set1_epi32(int(0xffff0000)))
                                        : _mm512_slli_epi32(words, 16));
    }
};

} // namespace

const Kernel kAvx512Kernel{convert<Avx512>, multiply<Avx512>};

} // namespace w16a16
