// The fp8 kernel, written once over a vector type V; each instruction set's file instantiates it. As in kernel.h,
// whose loads and stores it uses, everything is in an unnamed namespace.
#pragma once

#include "kernel.h"
#include "w8a16.h"

namespace w8a16 {
namespace {

// totals[r, :] += sum over `count` lines of number * x, for R rows and one slice of the tile's outputs. An output has
// V::parts sums, side by side.
template <class V, Format E, int R>
void accumulate(const uint8_t *line, int64_t count, const typename V::Value *x, int64_t stride, int slice,
                w4a8::Ahead &ahead, float *totals) {
    constexpr int row_totals = V::parts * kTileOutputs;
    totals += slice * V::vectors * V::lanes;
    typename V::F total[R][V::vectors];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < V::vectors; ++c) total[r][c] = V::load_float(totals + r * row_totals + c * V::lanes);

#pragma GCC unroll 1
    for (int64_t i = 0; i < count; ++i, line += kLineBytes, x += 2) {
        typename V::Numbers numbers[V::vectors];
        V::template decode<E>(line, slice, numbers);
        ahead.fetch();
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const typename V::Numbers pair = V::broadcast_pair(x + r * stride);
#pragma GCC unroll 8
            for (int c = 0; c < V::vectors; ++c) total[r][c] = V::multiply_add(numbers[c], pair, total[r][c]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < V::vectors; ++c) V::store_float(totals + r * row_totals + c * V::lanes, total[r][c]);
}

template <class V, Format E, int R = V::max_rows>
void accumulate_rows(int64_t rows, const uint8_t *line, int64_t count, const typename V::Value *x, int64_t stride,
                     w4a8::Ahead &ahead, float *totals) {
    if constexpr (R > 1)
        if (rows < R) return accumulate_rows<V, E, R - 1>(rows, line, count, x, stride, ahead, totals);
    for (int slice = 0; slice < V::slices; ++slice)
        accumulate<V, E, R>(line, count, x, stride, slice, ahead, totals);
}

// The tile's sums for rows [begin, end). A stretch of the weights that fits the first-level cache is used for all
// rows and slices before the next one is read, so that the weights come from memory once.
template <class V, Format E>
void accumulate_tile(const Weights &w, const Activations &a, int64_t tile, int64_t begin, int64_t end, float *totals) {
    const auto *x = reinterpret_cast<const typename V::Value *>(a.values);
    const int64_t row_blocks = (end - begin + V::max_rows - 1) / V::max_rows, passes = row_blocks * V::slices;
    const int64_t step = passes == 1 ? w.lines() : kStretchLines;
    for (int64_t i = 0; i < w.lines(); i += step) {
        const int64_t count = w.lines() - i < step ? w.lines() - i : step;
        const uint8_t *line = w.tile(tile) + kScalesBytes + i * kLineBytes;
        w4a8::Ahead ahead{line + (passes == 1 ? kPrefetchBytes : count * kLineBytes), (kLineBytes + passes - 1) / passes};
        // Blocks of rows differ by at most one row, so that none is left nearly empty.
        for (int64_t row = begin, left = row_blocks; left > 0; --left) {
            const int64_t rows = (end - row + left - 1) / left;
            accumulate_rows<V, E>(rows, line, count, x + row * a.stride + 2 * i, a.stride, ahead,
                                  totals + (row - begin) * V::parts * kTileOutputs);
            row += rows;
        }
    }
}

template <class V>
void finish(const Weights &w, const Output &out, int64_t tile, int64_t begin, int64_t end, const float *totals) {
    const int64_t first = tile * kTileOutputs;
    const int64_t valid = w.outputs - first < kTileOutputs ? w.outputs - first : kTileOutputs;
    const int64_t element = w4a8::element_bytes(out.dtype);

    alignas(64) char bias[kTileOutputs * 4] = {};
    if (out.bias) {
        const int64_t bias_element = w4a8::element_bytes(out.bias_dtype);
        std::memcpy(bias, static_cast<const char *>(out.bias) + first * bias_element, valid * bias_element);
    }
    for (int64_t row = begin; row < end; ++row, totals += V::parts * kTileOutputs) {
        char *to = static_cast<char *>(out.data) + (row * w.outputs + first) * element;
        alignas(64) char last[kTileOutputs * 4];
        char *whole = valid == kTileOutputs ? to : last;
        for (int i = 0; i < kTileOutputs; i += V::lanes)
            w4a8::store<V>(whole, out.dtype, i,
                           V::fma(V::load_float(w.tile(tile) + 4 * i), V::total(totals + V::parts * i),
                                  w4a8::load<V>(bias, out.bias_dtype, i)));
        if (whole == last) std::memcpy(to, last, valid * element);
    }
}

template <class V>
void multiply(const Weights &w, const Activations &a, const Output &out, int64_t tile, int64_t begin, int64_t end) {
    alignas(64) float totals[kMaxTaskRows * V::parts * kTileOutputs];
    std::memset(totals, 0, (end - begin) * V::parts * kTileOutputs * sizeof(float));
    (w.format == kE4M3 ? accumulate_tile<V, kE4M3> : accumulate_tile<V, kE5M2>)(w, a, tile, begin, end, totals);
    finish<V>(w, out, tile, begin, end, totals);
}

template <class V> void convert(const void *x, DType dtype, const Weights &w, const Activations &a, int64_t row) {
    const int64_t element = w4a8::element_bytes(dtype);
    const char *from = static_cast<const char *>(x) + row * w.inputs * element;
    auto *to = reinterpret_cast<typename V::Value *>(a.values) + row * a.stride;
    int64_t k = 0;
    for (; k + V::lanes <= w.inputs; k += V::lanes) V::store_values(to + k, w4a8::load<V>(from, dtype, k));
    if (k < w.inputs) {
        alignas(64) char last[V::lanes * 4] = {};
        std::memcpy(last, from + k * element, (w.inputs - k) * element);
        V::store_values(to + k, w4a8::load<V>(last, dtype, 0));
    }
}

} // namespace
} // namespace w8a16
