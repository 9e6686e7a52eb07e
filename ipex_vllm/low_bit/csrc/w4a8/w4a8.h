// int4 weights times int8 activations (W4A8): the C interface of the library, and what its files share.
// docs/kernels.md draws the packed layout and explains the loop.
#pragma once

#include "common/types.h"

namespace w4a8 {

using common::DType;
using common::kTileOutputs; // the low and the high nibbles of one 64-byte line
using common::Output;

constexpr int kLineBytes = 64;      // one packed line: 4 consecutive inputs of 32 outputs
constexpr int kTermBytes = 64;      // 32 float16 scales (or minima): one per output of the tile
constexpr int kBlockInputs = 32;    // the smallest group, and the step in which a kernel walks a group
constexpr int kStretchInputs = 512; // inputs of a tile that are used for all rows at once: 9 KiB of weights
constexpr int kSumsBytes = 8;       // what the weights' constant part needs of one row and group
constexpr int kRowPadding = 64;     // bytes between quantized rows, so that rows do not meet in the same cache set

enum Isa : int32_t { kNone = 0, kAvx2 = 1, kAvxVnni = 2, kAvx512Vnni = 3 };

struct Weights {
    const uint8_t *packed;
    int64_t outputs;
    int64_t inputs;
    int64_t group;
    bool symmetric;

    int64_t groups() const { return inputs / group; }
    int64_t tiles() const { return (outputs + kTileOutputs - 1) / kTileOutputs; }
    int64_t terms_bytes() const { return symmetric ? kTermBytes : 2 * kTermBytes; }
    int64_t block_bytes() const { return terms_bytes() + group / 4 * kLineBytes; }
    const uint8_t *block(int64_t tile, int64_t g) const { return packed + (tile * groups() + g) * block_bytes(); }
};

// Rows quantized to int8, x ~ scale * codes, with what the weights' constant part needs from each group.
struct Activations {
    int8_t *codes; // [rows, stride]
    float *scales; // [rows]
    void *sums;    // [rows, groups, 2]: int32 -8 * sum(codes) for symmetric weights, else float32 sum(codes), and
                   // the same times the kernel's high_factor for the outputs in the high nibbles
    int64_t stride;
    int64_t groups;
};

// What one instruction set offers; every set gives the same bits.
struct Kernel {
    void (*quantize)(const void *x, DType dtype, const Weights &, const Activations &, int64_t row);
    void (*multiply)(const Weights &, const Activations &, const Output &, int64_t tile, int64_t begin, int64_t end);
};

extern const Kernel kAvx2Kernel;
extern const Kernel kAvxVnniKernel;
extern const Kernel kAvx512VnniKernel;

} // namespace w4a8

#pragma GCC visibility push(default)
extern "C" {
// The best instruction set of this CPU (Isa); kNone when there is none to run on.
int32_t w4a8_isa();

// out[m, n] = sum_k x_q[m, k] * (scale[n, k / group] * code[n, k] + min[n, k / group]) + bias[n], where x_q is x
// rounded to int8 with one scale per row. Returns 0, or -1 when there is no memory for the quantized rows.
int32_t w4a8_linear(const void *x, const void *packed, const void *bias, void *out, int64_t rows, int64_t outputs,
                    int64_t inputs, int64_t group, int32_t symmetric, int32_t dtype, int32_t bias_dtype, int32_t isa,
                    int32_t threads);
}
#pragma GCC visibility pop
