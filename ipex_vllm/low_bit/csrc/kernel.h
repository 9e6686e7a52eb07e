// The kernel, written once over a vector type V; each instruction set's file instantiates it.
// Everything is in an unnamed namespace: each file is compiled for another machine, and no function of one
// may be linked in place of another's.
#pragma once

#include <cstring>

#include "w4a8.h"

namespace w4a8 {
namespace {

// One group of 32 outputs as it is stored: float16 terms, then lines of nibbles.
template <class V> struct PackedBlock {
    static int64_t bytes(const Weights &w) { return w.block_bytes(); }
    static const uint8_t *codes(const uint8_t *block, bool symmetric) {
        return block + (symmetric ? kTermBytes : 2 * kTermBytes);
    }
    static void load(const uint8_t *codes, int64_t line, int slice, typename V::I &low, typename V::I &high) {
        const typename V::I nibbles = V::load_bytes(codes + line * kLineBytes + slice * V::bytes);
        low = V::low_nibbles(nibbles);
        high = V::high_nibbles(nibbles);
        V::prefetch(codes + line * kLineBytes + V::prefetch_bytes);
    }
    static typename V::F scale(const uint8_t *block, int output) { return V::load_half(block + 2 * output); }
    static typename V::F min(const uint8_t *block, int output) {
        return V::load_half(block + kTermBytes + 2 * output);
    }
};

// The same group unpacked: float32 terms, then one byte per code, all still in 32 columns.
template <class V> struct PanelBlock {
    static constexpr int kTerms = 2 * kTileOutputs * 4;
    static int64_t bytes(const Weights &w) { return kTerms + w.group * kTileOutputs; }
    static const uint8_t *codes(const uint8_t *block, bool) { return block + kTerms; }
    static void load(const uint8_t *codes, int64_t line, int slice, typename V::I &low, typename V::I &high) {
        const uint8_t *p = codes + line * 2 * kLineBytes + slice * V::bytes;
        low = V::load_bytes(p);
        high = V::load_bytes(p + kLineBytes);
    }
    static typename V::F scale(const uint8_t *block, int output) { return V::load_float(block + 4 * output); }
    static typename V::F min(const uint8_t *block, int output) {
        return V::load_float(block + 4 * (kTileOutputs + output));
    }
};

template <class V> void unpack(const Weights &w, const uint8_t *packed, int64_t groups, uint8_t *panel) {
    using From = PackedBlock<V>;
    using To = PanelBlock<V>;
    for (int64_t g = 0; g < groups; ++g, packed += From::bytes(w), panel += To::bytes(w)) {
        for (int output = 0; output < kTileOutputs; output += V::lanes) {
            V::store_float(panel + 4 * output, From::scale(packed, output));
            if (!w.symmetric) V::store_float(panel + 4 * (kTileOutputs + output), From::min(packed, output));
        }
        const uint8_t *from = From::codes(packed, w.symmetric);
        uint8_t *to = panel + To::kTerms;
        for (int64_t line = 0; line < w.group / 4; ++line, to += 2 * kLineBytes)
            for (int slice = 0; slice < V::slices; ++slice) {
                typename V::I low, high;
                From::load(from, line, slice, low, high);
                V::store_bytes(to + slice * V::bytes, low);
                V::store_bytes(to + kLineBytes + slice * V::bytes, high);
            }
    }
}

// acc[r, :] += scale * sum(code * x) + min * sum(x) over `groups` groups, for R rows and one slice of the tile's
// outputs (V::lanes low-nibble outputs and as many high-nibble ones).
template <class V, class Block, bool Symmetric, int R>
void accumulate(const Weights &w, const uint8_t *block, const Activations &a, int64_t row, int64_t first_group,
                int64_t groups, int slice, float *acc) {
    using I = typename V::I;
    using F = typename V::F;
    const int column[2] = {slice * V::lanes, kTileOutputs / 2 + slice * V::lanes};
    const int8_t *x = a.codes + row * a.stride + first_group * w.group;
    const char *sums = static_cast<const char *>(a.sums) + (row * a.groups + first_group) * 4;

    F total[R][2];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int c = 0; c < 2; ++c) total[r][c] = V::load_float(acc + r * kTileOutputs + column[c]);

    for (int64_t g = 0; g < groups; ++g, block += Block::bytes(w), x += w.group, sums += 4) {
        I dot[R][2];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
            dot[r][0] = dot[r][1] = Symmetric ? V::broadcast(sums + r * a.groups * 4) : V::zero();

        const uint8_t *codes = Block::codes(block, Symmetric);
        for (int64_t line = 0; line < w.group / 4; line += kBlockInputs / 4) {
            typename V::Dot part[R][2];
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                part[r][0] = V::begin(dot[r][0]);
                part[r][1] = V::begin(dot[r][1]);
            }
#pragma GCC unroll 8
            for (int i = 0; i < kBlockInputs / 4; ++i) {
                I low, high;
                Block::load(codes, line + i, slice, low, high);
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) {
                    const I quad = V::broadcast(x + r * a.stride + 4 * (line + i));
                    part[r][0] = V::dot(part[r][0], low, quad);
                    part[r][1] = V::dot(part[r][1], high, quad);
                }
            }
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                dot[r][0] = V::end(dot[r][0], part[r][0]);
                dot[r][1] = V::end(dot[r][1], part[r][1]);
            }
        }
#pragma GCC unroll 2
        for (int c = 0; c < 2; ++c) {
            const F scale = Block::scale(block, column[c]);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) total[r][c] = V::fma(scale, V::to_float(dot[r][c]), total[r][c]);
            if constexpr (!Symmetric) {
                const F min = Block::min(block, column[c]);
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r)
                    total[r][c] = V::fma(min, V::broadcast_float(sums + r * a.groups * 4), total[r][c]);
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int c = 0; c < 2; ++c) V::store_float(acc + r * kTileOutputs + column[c], total[r][c]);
}

template <class V, class Block, int R = V::max_rows>
void accumulate_rows(int64_t rows, const Weights &w, const uint8_t *block, const Activations &a, int64_t row,
                     int64_t first_group, int64_t groups, float *acc) {
    if constexpr (R > 1)
        if (rows < R) return accumulate_rows<V, Block, R - 1>(rows, w, block, a, row, first_group, groups, acc);
    for (int slice = 0; slice < V::slices; ++slice)
        (w.symmetric ? accumulate<V, Block, true, R>
                     : accumulate<V, Block, false, R>)(w, block, a, row, first_group, groups, slice, acc);
}

// Splits rows into blocks of at most V::max_rows that differ by at most one row, so that none is left nearly empty.
template <class V, class Block>
void accumulate_blocks(const Weights &w, const uint8_t *block, const Activations &a, int64_t begin, int64_t end,
                       int64_t first_group, int64_t groups, float *acc) {
    for (int64_t row = begin, left = (end - begin + V::max_rows - 1) / V::max_rows; left > 0; --left) {
        const int64_t rows = (end - row + left - 1) / left;
        accumulate_rows<V, Block>(rows, w, block, a, row, first_group, groups, acc + (row - begin) * kTileOutputs);
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

inline int64_t element_bytes(DType dtype) { return dtype == kFloat32 ? 4 : 2; }

template <class V>
void finish(const Weights &w, const Activations &a, const Output &out, int64_t tile, int64_t begin, int64_t end,
            const float *acc) {
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
    for (int64_t row = begin; row < end; ++row, acc += kTileOutputs) {
        char *to = static_cast<char *>(out.data) + (row * w.outputs + first) * element;
        alignas(64) char last[kTileOutputs * 4];
        char *whole = valid == kTileOutputs ? to : last;
        const typename V::F scale = V::broadcast_float(a.scales + row);
        for (int i = 0; i < kTileOutputs; i += V::lanes)
            store<V>(whole, out.dtype, i, V::fma(scale, V::load_float(acc + i), V::load_float(bias + i)));
        if (whole == last) std::memcpy(to, last, valid * element);
    }
}

template <class V>
void multiply(const Weights &w, const Activations &a, const Output &out, int64_t tile, int64_t begin, int64_t end) {
    alignas(64) float acc[kMaxPanelRows * kTileOutputs];
    std::memset(acc, 0, (end - begin) * kTileOutputs * sizeof(float));
    if (end - begin <= V::max_direct_rows) {
        accumulate_blocks<V, PackedBlock<V>>(w, w.block(tile, 0), a, begin, end, 0, w.groups(), acc);
    } else {
        // An unpacked panel is read once per block of rows: it has to stay in the first-level cache.
        alignas(64) uint8_t panel[V::panel_inputs * kTileOutputs + V::panel_inputs / kBlockInputs * PanelBlock<V>::kTerms];
        const int64_t step = V::panel_inputs / w.group;
        for (int64_t g = 0; g < w.groups(); g += step) {
            const int64_t groups = w.groups() - g < step ? w.groups() - g : step;
            unpack<V>(w, w.block(tile, g), groups, panel);
            accumulate_blocks<V, PanelBlock<V>>(w, panel, a, begin, end, g, groups, acc);
        }
    }
    finish<V>(w, a, out, tile, begin, end, acc);
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
    int8_t *codes = a.codes + row * a.stride;
    for (int64_t g = 0; g < w.groups(); ++g) {
        typename V::I sum = V::zero();
        for (int64_t k = g * w.group; k < (g + 1) * w.group; k += V::lanes) {
            const typename V::I q = V::round(V::mul(load<V>(from, dtype, k), factor));
            V::store_int8(codes + k, q);
            sum = V::add(sum, q);
        }
        const int32_t total = V::reduce_add(sum);
        if (w.symmetric)
            static_cast<int32_t *>(a.sums)[row * a.groups + g] = -8 * total;
        else
            static_cast<float *>(a.sums)[row * a.groups + g] = static_cast<float>(total);
    }
}

} // namespace
} // namespace w4a8
