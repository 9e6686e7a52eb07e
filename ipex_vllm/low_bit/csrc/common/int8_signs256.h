// AVX2's one multiplication of bytes takes unsigned by signed ones and adds two products in 16 bits, where 255 * 127 twice
// has no room. A weight's magnitude and the activation with the weight's sign have: 2 * 128 * 127 = 32512.
#pragma once

#include "common/int8_vectors256.h"

namespace common {
namespace {

struct Signs256 {
    using Dot = __m256i;
    static constexpr int max_rows = 2;
    static Dot begin(__m256i total) { return total; }
    static Dot dot(Dot sum, __m256i codes, __m256i quad) {
        const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(codes), _mm256_sign_epi8(quad, codes));
        return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    static __m256i end(__m256i, Dot sum) { return sum; }
};

} // namespace
} // namespace common
