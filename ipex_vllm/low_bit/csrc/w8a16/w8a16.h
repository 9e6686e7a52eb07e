// 8-bit float weights times float activations (W8A16): the C interface, and what its files share.
// docs/kernels.md draws the packed layout and explains the loop.
#pragma once

#include "common/types.h"

namespace w8a16 {

using common::DType;
using common::kTileOutputs;
using common::Output;

constexpr int kScalesBytes = 128;    // 32 float32 scales, one per output of the tile: before each group of inputs
constexpr int kLineBytes = 64;       // one packed line: 2 consecutive inputs of 32 outputs
constexpr int kStretchLines = 128;   // lines of a tile that are used for all rows at once: 8 KiB of weights

enum Format : int32_t { kE4M3 = 0, kE5M2 = 1 };
enum Isa : int32_t { kNone = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };

struct Weights {
    const uint8_t *packed;
    int64_t outputs;
    int64_t inputs;
    int64_t group; // an even number of inputs that share scales and divide `inputs`; 0 for all of them
    Format format;

    int64_t groups() const { return group ? inputs / group : 1; }
    int64_t lines() const { return group ? group / 2 : (inputs + 1) / 2; } // of a group
    int64_t block_bytes() const { return kScalesBytes + lines() * kLineBytes; }
    int64_t tiles() const { return (outputs + kTileOutputs - 1) / kTileOutputs; }
    const uint8_t *block(int64_t tile, int64_t g) const { return packed + (tile * groups() + g) * block_bytes(); }
};

// Rows in the type that the kernel multiplies, zeros behind the last input.
struct Activations {
    char *values; // [rows, stride]
    int64_t stride;
};

// What one instruction set offers.
struct Kernel {
    int64_t value_bytes;
    void (*convert)(const void *x, DType dtype, const Weights &, const Activations &, int64_t row);
    void (*multiply)(const Weights &, const Activations &, const Output &, int64_t tile, int64_t begin, int64_t end);
};

extern const Kernel kAvx2Kernel;
extern const Kernel kAvx512Kernel;
extern const Kernel kAvx512Bf16Kernel;

const Kernel &kernel(int32_t isa);

} // namespace w8a16

#pragma GCC visibility push(default)
extern "C" {
// The best instruction set of this CPU (Isa) for such activations; kNone when there is none to run on.
int32_t w8a16_isa(int32_t dtype);

// out[m, n] = sum_k x[m, k] * scale[n, k / group] * number[n, k] + bias[n]; a group of 0 is all inputs. Returns 0, or -1 when there is no memory for a copy
// of the rows. kAvx512Bf16 multiplies bfloat16, to which it would round other activations.
int32_t w8a16_linear(const void *x, const void *packed, const void *bias, void *out, int64_t rows, int64_t outputs,
                     int64_t inputs, int64_t group, int32_t format, int32_t dtype, int32_t bias_dtype, int32_t isa, int32_t threads);
}
#pragma GCC visibility pop
