// Compiled with AVX2, FMA and F16C.
#include "common/int8_signs256.h"
#include "w8a8/kernel.h"

namespace w8a8 {
namespace {

struct Avx2 : common::Int8Vectors256<common::Signs256> {
    static constexpr int weight_of_zero = 0;
    static constexpr int slot(int) { return 0; }

    static void load_codes(const uint8_t *line, int slice, I (&codes)[2]) {
        const I flip = _mm256_set1_epi8(-128);
        codes[0] = _mm256_xor_si256(load_bytes(line + slice * bytes), flip);
        codes[1] = _mm256_xor_si256(load_bytes(line + kLineBytes / 2 + slice * bytes), flip);
    }
};

} // namespace

const Kernel kAvx2Kernel{quantize<Avx2>, multiply<Avx2>};

} // namespace w8a8
