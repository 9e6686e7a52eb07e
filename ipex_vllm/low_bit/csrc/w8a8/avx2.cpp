// Compiled with AVX2, FMA and F16C.
#include "common/int8_vectors256.h"
#include "w8a8/kernel.h"

namespace w8a8 {
namespace {

// The one multiplication of bytes takes unsigned by signed ones and adds two products in 16 bits, where 255 * 127 twice
// has no room. A weight's magnitude and the activation with the weight's sign have: 2 * 128 * 127 = 32512.
struct Signs {
    using Dot = __m256i;
    static constexpr int max_rows = 2;
    static Dot begin(__m256i total) { return total; }
    static Dot dot(Dot sum, __m256i codes, __m256i quad) {
        const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(codes), _mm256_sign_epi8(quad, codes));
        return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    static __m256i end(__m256i, Dot sum) { return sum; }
};

struct Avx2 : common::Int8Vectors256<Signs> {
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
