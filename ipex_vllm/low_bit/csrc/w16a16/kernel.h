// The kernel, written once over a vector type V; each instruction set's file instantiates it. As in common/tile.h,
// everything is in an unnamed namespace.
#pragma once

#include "common/tile.h"
#include "w16a16/w16a16.h"

namespace w16a16 {
namespace {

// The numbers of one of a line's two inputs, from the output `first` on. A bfloat16 is the upper half of a float32, so
// that the two inputs of an output lie side by side; float16 is converted, so that the outputs of an input do.
template <class V, DType T> typename V::F decode(const uint8_t *line, int first, int input) {
    if (T == common::kFloat16) return V::load_half(line + input * kLineBytes / 2 + first * 2);
    return V::upper_halves(line + first * 4, input);
}

// totals[r, first : first + W * lanes] += sum over `count` lines of weight * x, for R rows and W vectors of outputs.
template <class V, DType T, int R, int W>
void accumulate(const uint8_t *line, int64_t count, const float *x, int64_t stride, int first, common::Ahead<false> &ahead,
                float *totals) {
    totals += first;
    typename V::F total[R][W];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < W; ++c) total[r][c] = V::load_float(totals + r * kTileOutputs + c * V::lanes);

#pragma GCC unroll 1
    for (int64_t i = 0; i < count; ++i, line += kLineBytes, x += 2) {
#pragma GCC unroll 2
        for (int input = 0; input < 2; ++input) {
            ahead.fetch(); // half a line, which is one of the cache's
            typename V::F numbers[W];
#pragma GCC unroll 8
            for (int c = 0; c < W; ++c) numbers[c] = decode<V, T>(line, first + c * V::lanes, input);
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
                const typename V::F value = V::constant(x[r * stride + input]);
#pragma GCC unroll 8
                for (int c = 0; c < W; ++c) total[r][c] = V::fma(numbers[c], value, total[r][c]);
            }
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < W; ++c) V::store_float(totals + r * kTileOutputs + c * V::lanes, total[r][c]);
}

// The sums of a tile for rows [begin, end). A stretch of the weights that fits the first-level cache is used for all
// rows and slices of the tile before the next one is read, so that the weights come from memory once. Few rows leave
// registers for the whole tile at once.
template <class V, DType T>
void accumulate_tile(const Weights &w, const Activations &a, int64_t tile, int64_t begin, int64_t end, float *totals) {
    constexpr int whole = kTileOutputs / V::lanes, slices = whole / V::vectors;
    const bool few = end - begin <= V::few_rows;
    const int64_t row_blocks = few ? 1 : (end - begin + V::max_rows - 1) / V::max_rows;
    const int64_t passes = few ? 1 : row_blocks * slices;
    const int64_t step = passes == 1 ? w.lines() : kStretchLines;
    for (int64_t i = 0; i < w.lines(); i += step) {
        const int64_t count = w.lines() - i < step ? w.lines() - i : step;
        const uint8_t *line = w.tile(tile) + i * kLineBytes;
        const float *x = a.values + 2 * i;
        common::Ahead<false> ahead{line + (passes == 1 ? common::kPrefetchBytes : count * kLineBytes),
                                   (kLineBytes / 2 + passes - 1) / passes};
        if (few) {
            common::with_constant<V::few_rows>(end - begin, [&](auto R) {
                accumulate<V, T, R, whole>(line, count, x + begin * a.stride, a.stride, 0, ahead, totals);
            });
            continue;
        }
        common::for_row_blocks(begin, end, row_blocks, [&](int64_t row, int64_t rows) {
            common::with_constant<V::max_rows>(rows, [&](auto R) {
                for (int slice = 0; slice < slices; ++slice)
                    accumulate<V, T, R, V::vectors>(line, count, x + row * a.stride, a.stride,
                                                    slice * V::vectors * V::lanes, ahead,
                                                    totals + (row - begin) * kTileOutputs);
            });
        });
    }
}

template <class V>
void multiply(const Weights &w, const Activations &a, const Output &out, int64_t tile, int64_t begin, int64_t end) {
    alignas(64) float totals[common::kMaxTaskRows * kTileOutputs];
    std::memset(totals, 0, (end - begin) * kTileOutputs * sizeof(float));
    const auto accumulate =
        w.dtype == common::kFloat16 ? accumulate_tile<V, common::kFloat16> : accumulate_tile<V, common::kBFloat16>;
    accumulate(w, a, tile, begin, end, totals);
    common::write_tile<V>(out, w.outputs, tile, begin, end, [&](int64_t row, int i, typename V::F bias) {
        return V::add(V::load_float(totals + (row - begin) * kTileOutputs + i), bias);
    });
}

template <class V> void convert(const void *x, DType dtype, const Weights &w, const Activations &a, int64_t row) {
    float *to = a.values + row * a.stride;
    common::read_row<V>(x, dtype, w.inputs, row, [&](int64_t k, typename V::F values) { V::store_float(to + k, values); });
}

} // namespace
} // namespace w16a16
