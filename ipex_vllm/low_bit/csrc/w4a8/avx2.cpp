// Compiled with AVX2, FMA and F16C.
#include "common/int8_signs256.h"
#include "w4a8/nibbles256.h"

namespace w4a8 {
namespace {

// Codes reach 15 and activations 127, so the pairs of 32 inputs sum to at most 8 * 2 * 15 * 127 = 30480: int16
// holds them, and one widening step per 32 inputs is enough.
struct Pairs {
    using Dot = __m256i;
    static constexpr int max_rows = 2;
    static Dot begin(__m256i) { return _mm256_setzero_si256(); }
    static Dot dot(Dot sum, __m256i codes, __m256i quad) {
        return _mm256_add_epi16(sum, _mm256_maddubs_epi16(codes, quad));
    }
    static __m256i end(__m256i total, Dot sum) {
        return _mm256_add_epi32(total, _mm256_madd_epi16(sum, _mm256_set1_epi16(1)));
    }
};

using Avx2 = Nibbles256<Pairs>;
template <Table T> using Lookup = Levels256<common::Signs256, 0, T>;

} // namespace

const Kernel kAvx2Kernel{quantize<Avx2, Lookup>, multiply<Avx2, Lookup>};

} // namespace w4a8
