// The levels of a table in 512-bit vectors.
#pragma once

#include "common/int8_vectors512.h"
#include "w4a8/kernel.h"

namespace w4a8 {
namespace {

template <Table T> struct Levels512 : common::Int8Vectors512 {
    static constexpr int weight_of_zero = 128;
    static constexpr int max_rows = 6; // 12 int32 and 12 float32 accumulators, two codes, one activation, table, mask
    static constexpr int slot(int) { return 0; }

    static void load_codes(const uint8_t *line, int, I (&codes)[2]) { look_up(load_bytes(line), codes); }

    static void look_up(I nibbles, I (&codes)[2]) {
        const I mask = _mm512_set1_epi8(15);
        const I table = _mm512_broadcast_i32x4(_mm_xor_si128(levels<T>(), _mm_set1_epi8(-128)));
        codes[0] = _mm512_shuffle_epi8(table, _mm512_and_si512(nibbles, mask));
        codes[1] = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(nibbles, 4), mask));
    }
};

} // namespace
} // namespace w4a8
