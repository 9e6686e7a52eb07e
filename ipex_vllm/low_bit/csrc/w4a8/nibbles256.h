// Nibbles in 256-bit vectors. D multiplies them.
#pragma once

#include "common/int8_vectors256.h"
#include "w4a8/kernel.h"

namespace w4a8 {
namespace {

template <class D> struct Nibbles256 : common::Int8Vectors256<D> {
    using I = __m256i;
    static constexpr int slot(int) { return 0; } // both halves are as large as they are

    static void load_codes(const uint8_t *line, int slice, I (&codes)[2]) {
        const I mask = _mm256_set1_epi8(15), nibbles = Nibbles256::load_bytes(line + slice * Nibbles256::bytes);
        codes[0] = _mm256_and_si256(nibbles, mask);
        codes[1] = _mm256_and_si256(_mm256_srli_epi16(nibbles, 4), mask);
    }
};

} // namespace
} // namespace w4a8
