// What the kernels do alike with one tile of packed weights, over a vector type V: fetch ahead, split rows into blocks
// that the registers hold, load and store every dtype. Everything is in an unnamed namespace: each file is compiled for
// another machine, and no function of one may be linked in place of another's.
#pragma once

#include <cstring>
#include <type_traits>

#include "common/types.h"

namespace common {
namespace {

// Where the packed bytes of the near future are. Each line that is computed fetches a little of them, so that memory is
// read evenly and not only while codes are unpacked. A prefetch past the end of the weights is no access.
// They go into the first-level cache or stop at the second: that one has more requests under way on Intel's CPUs, where
// codes of few bits gain by it; on AMD's the detour takes longer.
template <bool StopsAtSecondLevel, int CacheLines = 1> struct Ahead {
    const uint8_t *next;
    int64_t bytes_per_line; // if these are more than CacheLines of the cache's, some lines are left to the hardware

    void fetch() {
#pragma GCC unroll 4
        for (int i = 0; i < CacheLines; ++i) __builtin_prefetch(next + i * kCacheLine, 0, StopsAtSecondLevel ? 2 : 3);
        next += bytes_per_line;
    }
};

// call(R) with `rows`, 1 to R, as a constant.
template <int R, class Call> void with_constant(int64_t rows, const Call &call) {
    if constexpr (R > 1)
        if (rows < R) return with_constant<R - 1>(rows, call);
    call(std::integral_constant<int, R>{});
}

// call(row, rows) for `blocks` blocks of the rows [begin, end), which differ by at most one row, so that none is left
// nearly empty.
template <class Call> void for_row_blocks(int64_t begin, int64_t end, int64_t blocks, const Call &call) {
    for (int64_t row = begin, left = blocks; left > 0; --left) {
        const int64_t rows = (end - row + left - 1) / left;
        call(row, rows);
        row += rows;
    }
}

template <class V> typename V::F load(const void *p, DType dtype, int64_t i) {
    if (dtype == kFloat32) return V::load_float(static_cast<const float *>(p) + i);
    const uint16_t *words = static_cast<const uint16_t *>(p) + i;
    return dtype == kFloat16 ? V::load_half(words) : V::load_bfloat16(words);
}

template <class V> void store(void *p, DType dtype, int64_t i, typename V::F value) {
    if (dtype == kFloat32) return V::store_float(static_cast<float *>(p) + i, value);
    uint16_t *words = static_cast<uint16_t *>(p) + i;
    return dtype == kFloat16 ? V::store_half(words, value) : V::store_bfloat16(words, value);
}

// store(k, values) for whole vectors of the row's `inputs`; behind the last input they hold zeros.
template <class V, class Store>
void read_row(const void *x, DType dtype, int64_t inputs, int64_t row, const Store &store) {
    const int64_t element = element_bytes(dtype);
    const char *from = static_cast<const char *>(x) + row * inputs * element;
    int64_t k = 0;
    for (; k + V::lanes <= inputs; k += V::lanes) store(k, load<V>(from, dtype, k));
    if (k < inputs) {
        alignas(64) char last[V::lanes * 4] = {};
        std::memcpy(last, from + k * element, (inputs - k) * element);
        store(k, load<V>(last, dtype, 0));
    }
}

// out[row, i] = result(row, i, bias) for the tile's outputs, of which the last ones may not exist. `result` gives
// V::lanes outputs from the i-th of the tile on.
template <class V, class Result>
void write_tile(const Output &out, int64_t outputs, int64_t tile, int64_t begin, int64_t end, const Result &result) {
    const int64_t first = tile * kTileOutputs;
    const int64_t valid = outputs - first < kTileOutputs ? outputs - first : kTileOutputs;
    const int64_t element = element_bytes(out.dtype);

    alignas(64) char bias[kTileOutputs * 4] = {};
    if (out.bias) {
        const int64_t bias_element = element_bytes(out.bias_dtype);
        std::memcpy(bias, static_cast<const char *>(out.bias) + first * bias_element, valid * bias_element);
    }
    for (int64_t row = begin; row < end; ++row) {
        char *to = static_cast<char *>(out.data) + (row * outputs + first) * element;
        alignas(64) char last[kTileOutputs * 4];
        char *whole = valid == kTileOutputs ? to : last;
        for (int i = 0; i < kTileOutputs; i += V::lanes)
            store<V>(whole, out.dtype, i, result(row, i, load<V>(bias, out.bias_dtype, i)));
        if (whole == last) std::memcpy(to, last, valid * element);
    }
}

} // namespace
} // namespace common
