// 16-bit float weights times float activations, in float32 (W16A16): the C interface, and what its files share.
// docs/kernels.md draws the packed layout.
#pragma once

#include "common/types.h"

namespace w16a16 {

using common::DType;
using common::kTileOutputs;
using common::Output;

constexpr int kLineBytes = 128;    // one packed line: 2 consecutive inputs of 32 outputs
constexpr int kStretchLines = 64;  // lines of a tile that are used for all rows at once: 8 KiB of weights

enum Isa : int32_t { kNone = 0, kAvx2 = 1, kAvx512 = 2 };

struct Weights {
    const uint8_t *packed;
    int64_t outputs;
    int64_t inputs;
    DType dtype; // kBFloat16 or kFloat16

    int64_t lines() const { return (inputs + 1) / 2; }
    int64_t tiles() const { return (outputs + kTileOutputs - 1) / kTileOutputs; }
    const uint8_t *tile(int64_t t) const { return packed + t * lines() * kLineBytes; }
};

// Rows as float32, zeros behind the last input.
struct Activations {
    float *values; // [rows, stride]
    int64_t stride;
};

// What one instruction set offers.
struct Kernel {
    void (*convert)(const void *x, DType dtype, const Weights &, const Activations &, int64_t row);
    void (*multiply)(const Weights &, const Activations &, const Output &, int64_t tile, int64_t begin, int64_t end);
};

extern const Kernel kAvx2Kernel;
extern const Kernel kAvx512Kernel;

} // namespace w16a16

#pragma GCC visibility push(default)
extern "C" {
// The best instruction set of this CPU (Isa); kNone when there is none to run on.
int32_t w16a16_isa();

// out[m, n] = sum_k x[m, k] * weight[n, k] + bias[n]. Returns 0, or -1 when there is no memory for a copy of the rows.
int32_t w16a16_linear(const void *x, const void *packed, const void *bias, void *out, int64_t rows, int64_t outputs,
                      int64_t inputs, int32_t weight_dtype, int32_t dtype, int32_t bias_dtype, int32_t isa,
                      int32_t threads);
}
#pragma GCC visibility pop
