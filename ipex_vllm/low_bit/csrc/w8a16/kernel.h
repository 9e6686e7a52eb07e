// The kernel, written once over a vector type V; each instruction set's file instantiates it. As in common/tile.h,
// everything is in an unnamed namespace.
#pragma once

#include "common/tile.h"
#include "w8a16/w8a16.h"

namespace w8a16 {
namespace {

// totals[r, :] += sum over `count` lines of number * x, for R rows and one slice of the tile's outputs. An output has
// V::parts sums, side by side.
template <class V, Format E, int R>
void accumulate(const uint8_t *line, int64_t count, const typename V::Value *x, int64_t stride, int slice,
                common::Ahead<false> &ahead, float *totals) {
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

// The sums of one group of the tile's inputs for rows [begin, end). A stretch of the weights that fits the first-level
// cache is used for all rows and slices before the next one is read, so that the weights come from memory once.
template <class V, Format E>
void accumulate_group(const Weights &w, const Activations &a, int64_t tile, int64_t group, int64_t begin, int64_t end,
                      float *totals) {
    const auto *x = reinterpret_cast<const typename V::Value *>(a.values) + group * w.group;
    const int64_t row_blocks = (end - begin + V::max_rows - 1) / V::max_rows, passes = row_blocks * V::slices;
    const int64_t step = passes == 1 ? w.lines() : kStretchLines;
    for (int64_t i = 0; i < w.lines(); i += step) {
        const int64_t count = w.lines() - i < step ? w.lines() - i : step;
        const uint8_t *line = w.block(tile, group) + kScalesBytes + i * kLineBytes;
        common::Ahead<false> ahead{line + (passes == 1 ? common::kPrefetchBytes : count * kLineBytes),
                                   (kLineBytes + passes - 1) / passes};
        common::for_row_blocks(begin, end, row_blocks, [&](int64_t row, int64_t rows) {
            common::with_constant<V::max_rows>(rows, [&](auto R) {
                for (int slice = 0; slice < V::slices; ++slice)
                    accumulate<V, E, R>(line, count, x + row * a.stride + 2 * i, a.stride, slice, ahead,
                                        totals + (row - begin) * V::parts * kTileOutputs);
            });
        });
    }
}

template <class V>
void multiply(const Weights &w, const Activations &a, const Output &out, int64_t tile, int64_t begin, int64_t end) {
    const auto accumulate = w.format == kE4M3 ? accumulate_group<V, kE4M3> : accumulate_group<V, kE5M2>;
    const int64_t row_totals = V::parts * kTileOutputs, last = w.groups() - 1;
    alignas(64) float totals[common::kMaxTaskRows * V::parts * kTileOutputs]; // of a group, not scaled yet
    alignas(64) float sums[common::kMaxTaskRows * kTileOutputs];              // of the groups before the last, scaled
    const auto scaled = [&](int64_t group, int64_t row, int i, typename V::F sum) {
        const float *scales = reinterpret_cast<const float *>(w.block(tile, group));
        return V::fma(V::load_float(scales + i), V::total(totals + (row - begin) * row_totals + V::parts * i), sum);
    };
    std::memset(sums, 0, (end - begin) * kTileOutputs * sizeof(float));
    for (int64_t group = 0; group <= last; ++group) {
        std::memset(totals, 0, (end - begin) * row_totals * sizeof(float));
        accumulate(w, a, tile, group, begin, end, totals);
        if (group == last) break;
        for (int64_t row = begin; row < end; ++row)
            for (int i = 0; i < kTileOutputs; i += V::lanes) {
                float *sum = sums + (row - begin) * kTileOutputs + i;
                V::store_float(sum, scaled(group, row, i, V::load_float(sum)));
            }
    }
    common::write_tile<V>(out, w.outputs, tile, begin, end, [&](int64_t row, int i, typename V::F bias) {
        return scaled(last, row, i, V::add(V::load_float(sums + (row - begin) * kTileOutputs + i), bias));
    });
}

template <class V> void convert(const void *x, DType dtype, const Weights &w, const Activations &a, int64_t row) {
    auto *to = reinterpret_cast<typename V::Value *>(a.values) + row * a.stride;
    common::read_row<V>(x, dtype, w.inputs, row, [&](int64_t k, typename V::F values) { V::store_values(to + k, values); });
}

} // namespace
} // namespace w8a16
