// The kernel, written once over a vector type V; each instruction set's file instantiates it.
// As in common/tile.h, everything is in an unnamed namespace.
#pragma once

#include "common/tile.h"
#include "w4a8/w4a8.h"

namespace w4a8 {
namespace {

using common::Ahead;
using common::load;

// total[r, :] += scale * sum(code * x) + min * sum(x) over `groups` groups, for R rows and one slice of the tile's
// outputs: V::lanes of the low nibbles and as many of the high ones.
template <class V, bool Symmetric, int Group, int R>
void accumulate(const uint8_t *block, const Activations &a, int64_t row, int64_t first_group, int64_t groups, int slice,
                Ahead &ahead, float *totals) {
    using I = typename V::I;
    using F = typename V::F;
    constexpr int terms_bytes = (Symmetric ? 1 : 2) * kTermBytes;
    constexpr int lines = Group / 4, lines_per_step = kBlockInputs / 4;
    const int column[2] = {slice * V::lanes, kTileOutputs / 2 + slice * V::lanes};
    const int8_t *x = a.codes + row * a.stride + first_group * Group;
    const char *sums = static_cast<const char *>(a.sums) + (row * a.groups + first_group) * kSumsBytes;

    F total[R][2];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int c = 0; c < 2; ++c) total[r][c] = V::load_float(totals + r * kTileOutputs + column[c]);

    for (int64_t g = 0; g < groups; ++g, block += terms_bytes + lines * kLineBytes, x += Group, sums += kSumsBytes) {
        I dot[R][2];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
            for (int c = 0; c < 2; ++c)
                dot[r][c] = Symmetric ? V::broadcast(sums + r * a.groups * kSumsBytes + 4 * c) : V::zero();

        const uint8_t *codes = block + terms_bytes + slice * V::bytes;
#pragma GCC unroll 1
        for (int line = 0; line < lines; line += lines_per_step) {
            typename V::Dot part[R][2];
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
                for (int c = 0; c < 2; ++c) part[r][c] = V::begin(dot[r][c]);
#pragma GCC unroll 8
            for (int i = line; i < line + lines_per_step; ++i) {
                const I nibbles = V::load_bytes(codes + i * kLineBytes);
                const I low = V::low_nibbles(nibbles), high = V::high_nibbles(nibbles);
                // One row leaves so little to compute that the hardware's own prefetcher keeps up, and better alone.
                if constexpr (R > 1) ahead.fetch();
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) {
                    const I quad = V::broadcast(x + r * a.stride + 4 * i);
                    part[r][0] = V::dot(part[r][0], low, quad);
                    part[r][1] = V::dot(part[r][1], high, quad);
                }
            }
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
                for (int c = 0; c < 2; ++c) dot[r][c] = V::end(dot[r][c], part[r][c]);
        }
#pragma GCC unroll 2
        for (int c = 0; c < 2; ++c) {
            const F scale = V::load_half(block + 2 * column[c]);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) total[r][c] = V::fma(scale, V::to_float(dot[r][c]), total[r][c]);
            if constexpr (!Symmetric) {
                const F min = V::load_half(block + kTermBytes + 2 * column[c]);
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r)
                    total[r][c] =
                        V::fma(min, V::broadcast_float(sums + r * a.groups * kSumsBytes + 4 * c), total[r][c]);
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int c = 0; c < 2; ++c) V::store_float(totals + r * kTileOutputs + column[c], total[r][c]);
}

// The tile's sums for rows [begin, end). A stretch of the weights that fits the first-level cache is used for all
// rows before the next one is read, so that the weights come from memory once.
template <class V, bool Symmetric, int Group>
void accumulate_tile(const Weights &w, const Activations &a, int64_t tile, int64_t begin, int64_t end, float *totals) {
    const int64_t row_blocks = (end - begin + V::max_rows - 1) / V::max_rows;
    const int64_t step = row_blocks == 1 ? w.groups() : kStretchInputs / Group;
    const int64_t fetches = Group / 4 * V::slices * row_blocks; // for each group
    for (int64_t g = 0; g < w.groups(); g += step) {
        const int64_t groups = w.groups() - g < step ? w.groups() - g : step;
        const uint8_t *block = w.block(tile, g);
        const int64_t distance = row_blocks == 1 ? common::kPrefetchBytes : groups * w.block_bytes();
        Ahead ahead{block + distance, (w.block_bytes() + fetches - 1) / fetches};
        common::for_row_blocks(begin, end, row_blocks, [&](int64_t row, int64_t rows) {
            common::with_constant<V::max_rows>(rows, [&](auto R) {
                for (int slice = 0; slice < V::slices; ++slice)
                    accumulate<V, Symmetric, Group, R>(block, a, row, g, groups, slice, ahead,
                                                       totals + (row - begin) * kTileOutputs);
            });
        });
    }
}

template <class V>
void multiply(const Weights &w, const Activations &a, const Output &out, int64_t tile, int64_t begin, int64_t end) {
    alignas(64) float totals[common::kMaxTaskRows * kTileOutputs];
    std::memset(totals, 0, (end - begin) * kTileOutputs * sizeof(float));
    const auto accumulate = w.group == 32   ? w.symmetric ? accumulate_tile<V, true, 32> : accumulate_tile<V, false, 32>
                            : w.group == 64 ? w.symmetric ? accumulate_tile<V, true, 64> : accumulate_tile<V, false, 64>
                            : w.symmetric   ? accumulate_tile<V, true, 128>
                                            : accumulate_tile<V, false, 128>;
    accumulate(w, a, tile, begin, end, totals);
    common::write_tile<V>(out, w.outputs, tile, begin, end, [&](int64_t row, int i, typename V::F bias) {
        const float scale = i < kTileOutputs / 2 ? a.scales[row] : a.scales[row] / V::high_factor;
        return V::fma(V::broadcast_float(&scale), V::load_float(totals + (row - begin) * kTileOutputs + i), bias);
    });
}

// A row becomes round(x * 127 / max|x|), ties to even. A row that holds a NaN or an infinity gets that as its
// scale, so its outputs are not finite either; a row smaller than 2^-100 everywhere is zero.
template <class V> void quantize(const void *x, DType dtype, const Weights &w, const Activations &a, int64_t row) {
    using F = typename V::F;
    const char *from = static_cast<const char *>(x) + row * w.inputs * common::element_bytes(dtype);
    typename V::I largest = V::zero();
    for (int64_t k = 0; k < w.inputs; k += V::lanes)
        largest = V::max_magnitude(largest, load<V>(from, dtype, k));
    const float amax = V::reduce_magnitude(largest);
    const bool zero = amax < 0x1p-100f;
    a.scales[row] = zero ? 0.0f : amax / 127.0f;

    const float inverse = zero ? 0.0f : 127.0f / amax;
    const F factor = V::broadcast_float(&inverse);
    const int64_t groups = w.groups(), group = w.group;
    const bool symmetric = w.symmetric;
    int8_t *codes = a.codes + row * a.stride;
    char *sums = static_cast<char *>(a.sums) + row * groups * kSumsBytes;
    for (int64_t g = 0, k = 0; g < groups; ++g) {
        typename V::I sum = V::zero();
        for (const int64_t end = k + group; k < end; k += V::lanes) {
            const typename V::I q = V::round(V::mul(load<V>(from, dtype, k), factor));
            V::store_int8(codes + k, q);
            sum = V::add(sum, q);
        }
        const int32_t low = V::reduce_add(sum), high = V::high_factor * low;
        const int32_t folded[2] = {-8 * low, -8 * high};
        const float real[2] = {static_cast<float>(low), static_cast<float>(high)};
        std::memcpy(sums + g * kSumsBytes, symmetric ? static_cast<const void *>(folded) : real, kSumsBytes);
    }
}

} // namespace
} // namespace w4a8
