// Compiled with AVX2, FMA and F16C.
#include "common/floats256.h"
#include "w16a16/kernel.h"

namespace w16a16 {
namespace {

struct Avx2 : common::Floats256 {
    static constexpr int vectors = 2, max_rows = 6; // 12 sums, two vectors of numbers, one value, one mask
    static constexpr int few_rows = 2;              // 8 sums, four vectors of numbers, one value, one mask

    // The low or the high words of eight pairs, as the upper halves of floats.
    static F upper_halves(const uint8_t *pairs, int high) {
        const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(pairs));
        return _mm256_castsi256_ps(high ? _mm256_and_si256(words, _mm256_set1_epi32(int(0xffff0000)))
                                        : _mm256_slli_epi32(words, 16));
    }
};

} // namespace

const Kernel kAvx2Kernel{convert<Avx2>, multiply<Avx2>};

} // namespace w16a16
