// Compiled with AVX-512 F, BW, VL and BF16.
#include "w8a16/decode512.h"

namespace w8a16 {
namespace {

struct Avx512Bf16 : Decode512 {
    using Value = uint16_t;
    using Numbers = __m512bh;
    static constexpr int slices = 1, vectors = 2, parts = 1;
    static constexpr int max_rows = 12; // 24 sums, two vectors of numbers, one pair

    // Every number of these formats is one of bfloat16, so this rounds nothing.
    template <Format E> static void decode(const uint8_t *line, int, Numbers *numbers) {
        F floats[4];
        decode_floats<E>(line, floats);
        numbers[0] = _mm512_cvtne2ps_pbh(floats[1], floats[0]);
        numbers[1] = _mm512_cvtne2ps_pbh(floats[3], floats[2]);
    }
    static Numbers broadcast_pair(const uint16_t *x) {
        int32_t pair;
        std::memcpy(&pair, x, 4);
        return (Numbers)_mm512_set1_epi32(pair);
    }
    static F multiply_add(Numbers numbers, Numbers pair, F sum) { return _mm512_dpbf16_ps(sum, numbers, pair); }
    static F total(const float *sums) { return load_float(sums); }
    static void store_values(uint16_t *to, F v) { store_bfloat16(to, v); }
};

} // namespace

const Kernel kAvx512Bf16Kernel{sizeof(Avx512Bf16::Value), convert<Avx512Bf16>, multiply<Avx512Bf16>};

} // namespace w8a16
