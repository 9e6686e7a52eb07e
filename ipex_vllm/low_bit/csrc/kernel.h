// The kernel, written once over a vector type V; each instruction set's file instantiates it.
// Everything is in an unnamed namespace: each file is compiled for another machine, and no function of one
// may be linked in place of another's.
#pragma once

#include <cstring>

#include "w4a8.h"

namespace w4a8 {
namespace {

// Where the packed bytes of the near future are. Each line that is computed fetches a little of them, so that memory is
// read evenly and not only while codes are unpacked. A prefetch past the end of the weights is no access.
struct Ahead {
    const uint8_t *next;
    int64_t bytes_per_line;

    void fetch() {
        __builtin_prefetch(next);
        next += bytes_per_line;
    }
};

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

template <class V, bool Symmetric, int Group, int R = V::max_rows>
void accumulate_rows(int64_t rows, const uint8_t *block, const Activations &a, int64_t row, int64_t first_group,
                     int64_t groups, Ahead &ahead, float *totals) {
    if constexpr (R > 1)
        if (rows < R)
            return accumulate_rows<V, Symmetric, Group, R - 1>(rows, block, a, row, first_group, groups, ahead, totals);
    for (int slice = 0; slice < V::slices; ++slice)
        accumulate<V, Symmetric, Group, R>(block, a, row, first_group, groups, slice, ahead, totals);
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
        const int64_t distance = row_blocks == 1 ? kPrefetchBytes : groups * w.block_bytes();
        Ahead ahead{block + distance, (w.block_bytes() + fetches - 1) / fetches};
        // Blocks of rows differ by at most one row, so that none is left nearly empty.
        for (int64_t row = begin, left = row_blocks; left > 0; --left) {
            const int64_t rows = (end - row + left - 1) / left;
            accumulate_rows<V, Symmetric, Group>(rows, block, a, row, g, groups, ahead,
                                                 totals + (row - begin) * kTileOutputs);
            row += rows;
        }
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

inline int64_t element_bytes(DType dtype) { return dtype == kFloat32 ? 4 : 2; }

template <class V>
void finish(const Weights &w, const Activations &a, const Output &out, int64_t tile, int64_t begin, int64_t end,
            const float *totals) {
    const int64_t first = tile * kTileOutputs;
    const int64_t valid = w.outputs - first < kTileOutputs ? w.outputs - first : kTileOutputs;
    const int64_t element = element_bytes(out.dtype);

    alignas(64) float bias[kTileOutputs] = {};
    if (out.bias) {
        const char *from = static_cast<const char *>(out.bias) + first * element_bytes(out.bias_dtype);
        alignas(64) char copy[kTileOutputs * 4] = {};
        std::memcpy(copy, from, valid * element_bytes(out.bias_dtype));
        for (int i = 0; i < kTileOutputs; i += V::lanes) V::store_float(bias + i, load<V>(copy, out.bias_dtype, i));
    }
    for (int64_t row = begin; row < end; ++row, totals += kTileOutputs) {
        char *to = static_cast<char *>(out.data) + (row * w.outputs + first) * element;
        alignas(64) char last[kTileOutputs * 4];
        char *whole = valid == kTileOutputs ? to : last;
        const float scales[2] = {a.scales[row], a.scales[row] / V::high_factor};
        for (int i = 0; i < kTileOutputs; i += V::lanes) {
            const typename V::F scale = V::broadcast_float(scales + i / (kTileOutputs / 2));
            store<V>(whole, out.dtype, i, V::fma(scale, V::load_float(totals + i), V::load_float(bias + i)));
        }
        if (whole == last) std::memcpy(to, last, valid * element);
    }
}

template <class V>
void multiply(const Weights &w, const Activations &a, const Output &out, int64_t tile, int64_t begin, int64_t end) {
    alignas(64) float totals[kMaxTaskRows * kTileOutputs];
    std::memset(totals, 0, (end - begin) * kTileOutputs * sizeof(float));
    const auto accumulate = w.group == 32   ? w.symmetric ? accumulate_tile<V, true, 32> : accumulate_tile<V, false, 32>
                            : w.group == 64 ? w.symmetric ? accumulate_tile<V, true, 64> : accumulate_tile<V, false, 64>
                            : w.symmetric   ? accumulate_tile<V, true, 128>
                                            : accumulate_tile<V, false, 128>;
    accumulate(w, a, tile, begin, end, totals);
    finish<V>(w, a, out, tile, begin, end, totals);
}

// A row becomes round(x * 127 / max|x|), ties to even. A row that holds a NaN or an infinity gets that as its
// scale, so its outputs are not finite either; a row smaller than 2^-100 everywhere is zero.
template <class V> void quantize(const void *x, DType dtype, const Weights &w, const Activations &a, int64_t row) {
    using F = typename V::F;
    const char *from = static_cast<const char *>(x) + row * w.inputs * element_bytes(dtype);
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
