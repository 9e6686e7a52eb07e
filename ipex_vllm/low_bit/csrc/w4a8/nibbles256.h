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

// The levels that the nibbles stand for, plus Zero.
template <class D, int Zero, Table T> struct Levels256 : Nibbles256<D> {
    using I = __m256i;
    static constexpr int weight_of_zero = Zero, max_rows = 2;

    static void load_codes(const uint8_t *line, int slice, I (&codes)[2]) {
        Nibbles256<D>::load_codes(line, slice, codes);
        const I table = _mm256_broadcastsi128_si256(_mm_xor_si128(levels<T>(), _mm_set1_epi8(char(Zero))));
        codes[0] = _mm256_shuffle_epi8(table, codes[0]);
        codes[1] = _mm256_shuffle_epi8(table, codes[1]);
    }
};

} // namespace
} // namespace w4a8
