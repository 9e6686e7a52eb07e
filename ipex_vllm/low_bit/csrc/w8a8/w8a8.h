// int8 weights times int8 activations (W8A8): the C interface of the kernel, and what its files share.
// docs/kernels.md draws the packed layout and explains the loop.
#pragma once

#include "common/int8.h"

namespace w8a8 {

using common::Activations;
using common::DType;
using common::Output;

constexpr int kLineBytes = 128; // one packed line: 4 consecutive inputs of 32 outputs
constexpr int kFewestAmxRows = 16; // from which on AMX is faster

struct Weights {
    const uint8_t *packed; // a byte is a code + 128
    int64_t outputs;
    int64_t inputs;
    int64_t group; // inputs that share a float16 scale, 32 or 64; 0: a float32 scale for each output

    int64_t step() const { return group ? group : common::kLargestStep; }
    int64_t blocks() const { return (inputs + step() - 1) / step(); }
    int64_t tiles() const { return (outputs + common::kTileOutputs - 1) / common::kTileOutputs; }
    int64_t block_bytes() const { return (group ? common::kTermBytes : 0) + step() / 4 * kLineBytes; }
    int64_t head_bytes() const { return group ? 0 : common::kTileOutputs * 4; }
    int64_t tile_bytes() const { return head_bytes() + blocks() * block_bytes(); }
};

// What one instruction set offers; every set gives the same bits.
struct Kernel {
    void (*quantize)(const void *x, DType dtype, const Weights &, const Activations &, int64_t row);
    void (*multiply)(const Weights &, const Activations &, const Output &, int64_t tile, int64_t begin, int64_t end);
};

extern const Kernel kAvx2Kernel;
extern const Kernel kAvxVnniKernel;
extern const Kernel kAvx512VnniKernel;
extern const Kernel *const kAmxKernel; // null where the compiler does not know AMX

// The one for a common::Isa.
const Kernel &kernel(int32_t isa);

} // namespace w8a8

#pragma GCC visibility push(default)
extern "C" {
// The best instruction set of this CPU (common::Isa) for so many rows; kNone when there is none to run on.
int32_t w8a8_isa(int64_t rows);

// out[m, n] = sum_k x_q[m, k] * scale[n, k / group] * code[n, k] + bias[n], where x_q is x rounded to int8 with one
// scale for each group of 32 or 64 inputs; with group 0, scale is [n] and x's groups are of 64. Returns 0, or -1 when
// there is no memory for the quantized rows.
int32_t w8a8_linear(const void *x, const void *packed, const void *bias, void *out, int64_t rows, int64_t outputs,
                    int64_t inputs, int64_t group, int32_t dtype, int32_t bias_dtype, int32_t isa, int32_t threads);
}
#pragma GCC visibility pop
