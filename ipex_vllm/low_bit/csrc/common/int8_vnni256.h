// AVX-VNNI multiplies codes by activations in one instruction.
#pragma once

#include "common/int8_vectors256.h"

namespace common {
namespace {

struct Vnni256 {
    using Dot = __m256i;
    static constexpr int max_rows = 3; // 6 int32 and 6 float32 accumulators, two codes, one activation: 15 of 16
    static Dot begin(__m256i total) { return total; }
    static Dot dot(Dot sum, __m256i codes, __m256i quad) { return _mm256_dpbusd_avx_epi32(sum, codes, quad); }
    static __m256i end(__m256i, Dot sum) { return sum; }
};

} // namespace
} // namespace common
