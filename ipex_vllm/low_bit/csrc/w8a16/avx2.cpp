// Compiled with AVX2, FMA and F16C.
#include "common/floats256.h"
#include "w8a16/kernel.h"

namespace w8a16 {
namespace {

struct Avx2 : common::Floats256 {
    using Value = float;
    using Numbers = F;
    static constexpr int slices = 4, vectors = 2, parts = 2; // a slice is 8 outputs
    static constexpr int max_rows = 6; // 12 sums, two vectors of numbers, one pair: 15 of 16

    template <Format E> static void decode(const uint8_t *line, int slice, F *numbers) {
        const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(line) + slice % 2);
        const __m256i bits = halves<E>(slice < 2 ? _mm256_slli_epi16(words, 8) : words);
        numbers[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(bits));
        numbers[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(bits, 1));
    }
    static F broadcast_pair(const float *x) {
        double pair;
        std::memcpy(&pair, x, 8);
        return _mm256_castpd_ps(_mm256_set1_pd(pair));
    }
    static F multiply_add(F numbers, F pair, F sum) { return fma(numbers, pair, sum); }
    static F total(const float *sums) {
        const F pairs = _mm256_hadd_ps(load_float(sums), load_float(sums + lanes));
        return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(pairs), 0xd8));
    }
    static void store_values(float *to, F v) { store_float(to, v); }

  private:
    // As in decode512.h.
    template <Format E> static __m256i halves(__m256i words) {
        if (E == kE5M2) return _mm256_and_si256(words, _mm256_set1_epi16(short(0xff00)));
        return _mm256_and_si256(_mm256_srai_epi16(words, 1), _mm256_set1_epi16(short(0xbf80)));
    }
};

} // namespace

const Kernel kAvx2Kernel{sizeof(Avx2::Value), convert<Avx2>, multiply<Avx2>};

} // namespace w8a16
