// The kernels for integer weights with AMX, over a 512-bit vector type V and a packed layout L. Sums within a group come
// from AMX, 16 rows and 16 outputs at a time; what is done with them, and so every bit, is as in int8_kernel.h.
#pragma once

#include "common/int8_kernel.h"

namespace common {
namespace {

// The registers (Intel's manual, "TILECFG"): 0 to 3 hold sums, 4 and 5 activations, 6 and 7 weights.
struct alignas(64) TileConfig {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    explicit TileConfig(int step) {
        for (int i = 0; i < 8; ++i) {
            row_bytes[i] = i == 4 || i == 5 ? step : 64;
            rows[i] = i < 6 ? kAmxRows : step / 4;
        }
    }
};

constexpr int kChunkGroups = 8; // groups of activations that are multiplied before their sums are used
constexpr int kByteLine = 128;  // 4 inputs of 32 outputs, a byte each

using Sums = int32_t[kChunkGroups][2][kAmxRows][kTileOutputs / 2];

// sums[i] = the products of 16 rows with the groups that begin at `codes`; two at a time, in registers of their own.
template <int Step>
void multiply_groups(const int8_t *x, int64_t stride, const uint8_t *const *codes, int groups, Sums &sums) {
    constexpr int half = kByteLine / 2;
    for (int i = 0; i < groups; i += 2) {
        const int other = i + 1 < groups ? i + 1 : i; // an odd last one is computed twice
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        _tile_loadd(4, x + i * Step, stride);
        _tile_loadd(6, codes[i], kByteLine);
        _tile_dpbsud(0, 4, 6);
        _tile_loadd(7, codes[i] + half, kByteLine);
        _tile_dpbsud(1, 4, 7);
        _tile_loadd(5, x + other * Step, stride);
        _tile_loadd(6, codes[other], kByteLine);
        _tile_dpbsud(2, 5, 6);
        _tile_loadd(7, codes[other] + half, kByteLine);
        _tile_dpbsud(3, 5, 7);
        _tile_stored(0, sums[i][0], 64);
        _tile_stored(1, sums[i][1], 64);
        _tile_stored(2, sums[other][0], 64);
        _tile_stored(3, sums[other][1], 64);
    }
}

template <class V, class L, int R>
__attribute__((noinline)) void add_groups(const uint8_t *block, const GroupTerms *terms, int64_t row_terms, int groups,
                                          const Sums &sums, int first_row, Ahead<true> &ahead, int fetches,
                                          float *totals) {
    constexpr int column[2] = {0, kTileOutputs / 2}, steps = L::group / L::step;
    typename V::F total[R][2];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int c = 0; c < 2; ++c) total[r][c] = V::load_float(totals + r * kTileOutputs + column[c]);
    for (int i = 0; i < groups; ++i) {
        typename V::I dot[R][2];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
            for (int c = 0; c < 2; ++c)
                dot[r][c] = V::add(V::load_bytes(sums[i][c][first_row + r]), V::set(terms[r * row_terms + i].start[0]));
        add_group<V, L, R, 2>(dot, block + i / steps * L::block_bytes, column, terms + i, row_terms, total);
        for (int fetch = 0; fetch < fetches; ++fetch) ahead.fetch();
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int c = 0; c < 2; ++c) V::store_float(totals + r * kTileOutputs + column[c], total[r][c]);
}

template <class V, class L>
void multiply_tile_amx(const Matrix &w, const Activations &a, const Output &out, int64_t tile, int64_t begin,
                       int64_t end) {
    constexpr int steps = L::group / L::step, stretch = L::stretch_blocks, half = 8;
    alignas(64) float totals[kMaxTaskRows * kTileOutputs];
    alignas(64) Sums sums;
    alignas(64) uint8_t bytes[L::bits == 8 ? 64 : stretch * L::group * kTileOutputs];
    std::memset(totals, 0, (end - begin) * kTileOutputs * sizeof(float));

    const int64_t row_blocks = (end - begin + kAmxRows - 1) / kAmxRows;
    const int fetches = (L::block_bytes / 64 / steps + 2 * row_blocks - 1) / (2 * row_blocks); // for each half block
    const uint8_t *first = tile_of<L>(w, tile) + L::head_bytes;
    const TileConfig config(L::step);
    asm volatile("" ::"r"(&config) : "memory"); // GCC knows that the next reads no more than a pointer of it
    _tile_loadconfig(&config);
    for (int64_t b = 0; b < w.blocks; b += stretch) {
        const int64_t blocks = w.blocks - b < stretch ? w.blocks - b : stretch;
        const uint8_t *block = first + b * L::block_bytes;
        const uint8_t *codes[stretch * steps];
        for (int i = 0; i < blocks * steps; ++i) {
            const uint8_t *packed = block + i / steps * L::block_bytes + L::terms_bytes + i % steps * (L::step / 4) * L::line_bytes;
            codes[i] = L::bits == 8 ? packed : bytes + i * L::step * kTileOutputs;
            if constexpr (L::bits == 4) V::unpack(packed, L::step / 4, bytes + i * L::step * kTileOutputs);
        }
        asm volatile("" ::: "memory"); // GCC does not know that tiles read memory
        Ahead<true> ahead{block + blocks * L::block_bytes, 64};
        for_row_blocks(begin, end, row_blocks, [&](int64_t row, int64_t rows) {
            for (int g = 0; g < blocks * steps; g += kChunkGroups) {
                const int groups = blocks * steps - g < kChunkGroups ? blocks * steps - g : kChunkGroups;
                multiply_groups<L::step>(a.codes + row * a.stride + (b * steps + g) * L::step, a.stride, codes + g, groups, sums);
                for_row_blocks(0, rows, (rows + half - 1) / half, [&](int64_t part, int64_t part_rows) {
                    with_constant<half>(part_rows, [&](auto R) {
                        add_groups<V, L, R>(block + g / steps * L::block_bytes,
                                            a.terms + (row + part) * a.groups + b * steps + g, a.groups, groups, sums,
                                            part, ahead, fetches, totals + (row + part - begin) * kTileOutputs);
                    });
                });
            }
        });
    }
    _tile_release();
    write_totals<V, L>(w, out, tile, begin, end, totals);
}

} // namespace
} // namespace common
