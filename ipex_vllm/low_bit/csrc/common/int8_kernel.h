// The kernels for integer weights, written once over a vector type V and a packed layout L; the file of each kernel and
// instruction set instantiates them. As in common/tile.h, everything is in an unnamed namespace.
#pragma once

#include <algorithm>

#include "common/int8.h"
#include "common/tile.h"

namespace common {
namespace {

// A tile: what it has for each output (32 float32 scales, or nothing), then blocks of Group inputs: Terms times 32
// float16 (scales; minima), and lines of 4 inputs of 32 outputs, Bits for a code.
template <int Bits, int Group, int Terms> struct Layout {
    static constexpr int bits = Bits, group = Group, step = Group < kLargestStep ? Group : kLargestStep, terms = Terms;
    static constexpr int head_bytes = Terms ? 0 : kTileOutputs * 4;
    static constexpr int terms_bytes = Terms * kTermBytes, line_bytes = kTileOutputs * Bits / 2;
    static constexpr int block_bytes = terms_bytes + Group / 4 * line_bytes;
    static constexpr int stretch_blocks = 2048 / Bits / Group; // used for all rows at once: 9 KiB
};

struct Matrix {
    const uint8_t *packed;
    int64_t outputs;
    int64_t blocks; // of a tile
};

template <class L> const uint8_t *tile_of(const Matrix &w, int64_t tile) {
    return w.packed + tile * (L::head_bytes + w.blocks * L::block_bytes);
}

// total += scale * (terms.scale * sum) + min * terms.sum, where sum is what a dot product holds beyond its start; for R
// rows and C vectors of outputs, which begin at `column` of the tile.
template <class V, class L, int R, int C>
inline __attribute__((always_inline)) void add_group(const typename V::I (&dot)[R][C], const uint8_t *block,
                                                     const int (&column)[C], const GroupTerms *terms,
                                                     int64_t row_terms, typename V::F (&total)[R][C]) {
    using F = typename V::F;
    F scale[C], min[C];
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c) {
        if constexpr (L::terms > 0) scale[c] = V::load_half(block + 2 * column[c]);
        if constexpr (L::terms > 1) min[c] = V::load_half(block + kTermBytes + 2 * column[c]);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
        const GroupTerms &t = terms[r * row_terms];
        const F x_scale = V::broadcast_float(&t.scale);
#pragma GCC unroll 2
        for (int c = 0; c < C; ++c) {
            const F part = V::fma(x_scale, V::as_float(dot[r][c]), V::broadcast_float(&t.offset[V::slot(c)]));
            if constexpr (L::terms == 0)
                total[r][c] = V::add(total[r][c], part);
            else
                total[r][c] = V::fma(scale[c], part, total[r][c]);
            if constexpr (L::terms == 2) total[r][c] = V::fma(min[c], V::broadcast_float(&t.sum), total[r][c]);
        }
    }
}

// totals[r, :] += the products over `blocks` blocks, for R rows and one slice of the tile's outputs: V::lanes of the
// first half and as many of the second.
template <class V, class L, int R, bool IsIntel, int CacheLines>
__attribute__((noinline)) void accumulate(const uint8_t *block, const Activations &a, int64_t row, int64_t first_block, int64_t blocks, int slice,
                Ahead<IsIntel, CacheLines> &ahead, float *totals) {
    using I = typename V::I;
    constexpr int steps = L::group / L::step, lines = L::step / 4, lines_per_part = 8;
    const int column[2] = {slice * V::lanes, kTileOutputs / 2 + slice * V::lanes};
    const int8_t *x = a.codes + row * a.stride + first_block * L::group;
    const GroupTerms *terms = a.terms + row * a.groups + first_block * steps;

    typename V::F total[R][2];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int c = 0; c < 2; ++c) total[r][c] = V::load_float(totals + r * kTileOutputs + column[c]);

    for (int64_t b = 0; b < blocks; ++b, block += L::block_bytes) {
        const uint8_t *codes = block + L::terms_bytes;
#pragma GCC unroll 1
        for (int step = 0; step < steps; ++step, x += L::step, ++terms) {
            I dot[R][2];
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
                for (int c = 0; c < 2; ++c) dot[r][c] = V::broadcast(&terms[r * a.groups].start[V::slot(c)]);
#pragma GCC unroll 1
            for (int line = 0; line < lines; line += lines_per_part) {
                typename V::Dot part[R][2];
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
                    for (int c = 0; c < 2; ++c) part[r][c] = V::begin(dot[r][c]);
#pragma GCC unroll 8
                for (int i = line; i < line + lines_per_part; ++i, codes += L::line_bytes) {
                    I weights[2];
                    V::load_codes(codes, slice, weights);
                    // One row that is computed in one pass leaves AMD's own prefetcher so evenly busy that it is better alone.
                    if constexpr (R > 1 || V::slices > 1 || IsIntel) ahead.fetch();
#pragma GCC unroll 8
                    for (int r = 0; r < R; ++r) {
                        const I quad = V::broadcast(x + r * a.stride + 4 * i);
#pragma GCC unroll 2
                        for (int c = 0; c < 2; ++c) part[r][c] = V::dot(part[r][c], weights[c], quad);
                    }
                }
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
                    for (int c = 0; c < 2; ++c) dot[r][c] = V::end(dot[r][c], part[r][c]);
            }
            add_group<V, L, R, 2>(dot, block, column, terms, a.groups, total);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int c = 0; c < 2; ++c) V::store_float(totals + r * kTileOutputs + column[c], total[r][c]);
}

// The tile's sums for rows [begin, end). A stretch of the weights that fits the first-level cache is used for all
// rows and slices before the next one is read, so that the weights come from memory once. One pass needs no stretches.
template <class V, class L, bool IsIntel>
void accumulate_tile(const Matrix &w, const Activations &a, int64_t tile, int64_t begin, int64_t end, float *totals) {
    const int64_t row_blocks = (end - begin + V::max_rows - 1) / V::max_rows;
    const int64_t passes = row_blocks * V::slices;
    constexpr int64_t lines = L::group / 4, bytes_per_line = (L::block_bytes + lines - 1) / lines;
    const uint8_t *first = tile_of<L>(w, tile) + L::head_bytes;
    const auto accumulate_stretch = [&](const uint8_t *block, int64_t b, int64_t blocks, auto ahead) {
        for_row_blocks(begin, end, row_blocks, [&](int64_t row, int64_t rows) {
            with_constant<V::max_rows>(rows, [&](auto R) {
                for (int slice = 0; slice < V::slices; ++slice)
                    accumulate<V, L, R>(block, a, row, b, blocks, slice, ahead, totals + (row - begin) * kTileOutputs);
            });
        });
    };
    if constexpr (V::slices == 1)
        if (passes == 1) {
            constexpr int cache_lines = (bytes_per_line + kCacheLine - 1) / kCacheLine;
            using AheadOfAll = Ahead<IsIntel, cache_lines>;
            return accumulate_stretch(first, 0, w.blocks, AheadOfAll{first + kPrefetchBytes, bytes_per_line});
        }
    for (int64_t b = 0; b < w.blocks; b += L::stretch_blocks) {
        const int64_t blocks = std::min(w.blocks - b, int64_t(L::stretch_blocks));
        const uint8_t *block = first + b * L::block_bytes, *next = block + blocks * L::block_bytes;
        accumulate_stretch(block, b, blocks, Ahead<IsIntel>{next, (bytes_per_line + passes - 1) / passes});
    }
}

template <class V, class L>
void write_totals(const Matrix &w, const Output &out, int64_t tile, int64_t begin, int64_t end, const float *totals) {
    const uint8_t *scales = tile_of<L>(w, tile); // where there are any
    write_tile<V>(out, w.outputs, tile, begin, end, [&](int64_t row, int i, typename V::F bias) {
        const typename V::F total = V::load_float(totals + (row - begin) * kTileOutputs + i);
        if constexpr (L::terms == 0) return V::fma(V::load_float(scales + 4 * i), total, bias);
        return V::add(total, bias);
    });
}

template <class V, class L>
void multiply_tile(const Matrix &w, const Activations &a, const Output &out, int64_t tile, int64_t begin, int64_t end) {
    alignas(64) float totals[kMaxTaskRows * kTileOutputs];
    std::memset(totals, 0, (end - begin) * kTileOutputs * sizeof(float));
    (is_intel() ? accumulate_tile<V, L, true> : accumulate_tile<V, L, false>)(w, a, tile, begin, end, totals);
    write_totals<V, L>(w, out, tile, begin, end, totals);
}

// A group of `step` inputs becomes round(x * 127 / max|x|), ties to even; `zero` is the code of a weight of 0. A group
// that is smaller than 2^-100 everywhere counts as zero; one that holds a NaN, an infinity or more than 2^100 makes the
// row's outputs NaN. Behind the last input there are zeros.
template <class V>
void quantize_row(const void *x, DType dtype, int64_t inputs, int64_t step, int32_t zero, const Activations &a,
                  int64_t row) {
    using I = typename V::I;
    const int64_t element = element_bytes(dtype);
    const char *from = static_cast<const char *>(x) + row * inputs * element;
    int8_t *codes = a.codes + row * a.stride;
    alignas(64) char last[kLargestStep * 4] = {};
    for (int64_t g = 0; g < a.groups; ++g, from += step * element, codes += step) {
        if (g * step + step > inputs) {
            std::memcpy(last, from, (inputs - g * step) * element);
            from = last;
        }
        I largest = V::zero();
        for (int64_t k = 0; k < step; k += V::lanes) largest = V::max_magnitude(largest, load<V>(from, dtype, k));
        const float amax = V::reduce_magnitude(largest);
        const bool is_zero = amax < 0x1p-100f;
        const float inverse = is_zero ? 0.0f : 127.0f / amax;
        const typename V::F factor = V::broadcast_float(&inverse);
        I sums = V::zero();
        for (int64_t k = 0; k < step; k += V::lanes) {
            const I q = V::round(V::mul(load<V>(from, dtype, k), factor));
            V::store_int8(codes + k, q);
            sums = V::add(sums, q);
        }
        const int32_t sum = V::reduce_add(sums);

        float scale = is_zero ? 0.0f : amax <= 0x1p100f ? amax / 127.0f : __builtin_inff();
        uint32_t bits;
        std::memcpy(&bits, &scale, 4);
        bits &= ~3u;
        std::memcpy(&scale, &bits, 4);
        GroupTerms &t = a.terms[row * a.groups + g];
        t = {{kStart[0] - zero * sum, kStart[1] - 16 * zero * sum},
             scale,
             {-kOffset[0] * scale, -kOffset[1] * scale},
             scale * float(sum)};
    }
}

} // namespace
} // namespace common
