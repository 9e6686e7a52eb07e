// Compiled with AVX-512 F, BW and VL.
#include "w8a16/decode512.h"

namespace w8a16 {
namespace {

struct Avx512 : Decode512 {
    using Value = float;
    using Numbers = F;
    static constexpr int slices = 1, vectors = 4, parts = 2;
    static constexpr int max_rows = 6; // 24 sums, four vectors of numbers, a line, one pair, one mask: 31 of 32

    template <Format E> static void decode(const uint8_t *line, int, F *numbers) { decode_floats<E>(line, numbers); }
    static F broadcast_pair(const float *x) {
        double pair;
        std::memcpy(&pair, x, 8);
        return _mm512_castpd_ps(_mm512_set1_pd(pair));
    }
    static F multiply_add(F numbers, F pair, F sum) { return fma(numbers, pair, sum); }
    static F total(const float *sums) {
        const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        const F first = load_float(sums), second = load_float(sums + lanes);
        return _mm512_add_ps(_mm512_permutex2var_ps(first, even, second),
                             _mm512_permutex2var_ps(first, _mm512_add_epi32(even, _mm512_set1_epi32(1)), second));
    }
    static void store_values(float *to, F v) { store_float(to, v); }
};

} // namespace

const Kernel kAvx512Kernel{sizeof(Avx512::Value), convert<Avx512>, multiply<Avx512>};

} // namespace w8a16
