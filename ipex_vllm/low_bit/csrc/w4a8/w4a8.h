// int4 weights times int8 activations (W4A8): the C interface of the kernel, and what its files share.
// docs/kernels.md draws the packed layout and explains the loop.
#pragma once

#include "common/int8.h"

namespace w4a8 {

using common::Activations;
using common::DType;
using common::Output;

constexpr int kLineBytes = 64; // one packed line: 4 consecutive inputs of 32 outputs
constexpr int kFewestAmxRows = 32; // from which on AMX is faster

// What a code stands for: itself, or a level of a table, in 127ths (QLoRA's NF4) or halves (OCP's E2M1).
enum Table : int32_t { kIntegers = 0, kNf4 = 1, kFp4 = 2 };

struct Weights {
    const uint8_t *packed;
    int64_t outputs;
    int64_t inputs;
    int64_t group;
    bool symmetric;
    Table table = kIntegers; // another one is symmetric

    int64_t groups() const { return inputs / group; }
    int64_t step() const { return group < common::kLargestStep ? group : common::kLargestStep; }
    int64_t tiles() const { return (outputs + common::kTileOutputs - 1) / common::kTileOutputs; }
    int64_t terms_bytes() const { return (symmetric ? 1 : 2) * common::kTermBytes; }
    int64_t block_bytes() const { return terms_bytes() + group / 4 * kLineBytes; }
    const uint8_t *block(int64_t tile, int64_t g) const { return packed + (tile * groups() + g) * block_bytes(); }
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

} // namespace w4a8

#pragma GCC visibility push(default)
extern "C" {
// The best instruction set of this CPU (common::Isa) for so many rows; kNone when there is none to run on.
int32_t w4a8_isa(int64_t rows);

// out[m, n] = sum_k x_q[m, k] * (scale[n, k / group] * code[n, k] + min[n, k / group]) + bias[n], where a code is the
// level that it stands for if there is a table, less 8 if it is symmetric without, and x_q is x
// rounded to int8 with one scale for each group of 32 or 64 inputs. Returns 0, or -1 when there is no memory for the
// quantized rows.
int32_t w4a8_linear(const void *x, const void *packed, const void *bias, void *out, int64_t rows, int64_t outputs,
                    int64_t inputs, int64_t group, int32_t symmetric, int32_t table, int32_t dtype, int32_t bias_dtype,
                    int32_t isa, int32_t threads);
}
#pragma GCC visibility pop
