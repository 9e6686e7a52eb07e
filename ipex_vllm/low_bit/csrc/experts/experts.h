// A layer of experts: each token goes through the few that were chosen for it. The C interface, and what its files share.
// docs/kernels.md explains the steps.
#pragma once

#include "common/types.h"

namespace experts {

using common::DType;

enum Activation : int32_t { kSilu = 0, kGelu = 1, kGeluTanh = 2, kClampedSwiglu = 3 };

// What is computed beside the matmuls, over vectors of floats; every instruction set gives the same bits.
struct Vectors {
    // gate[i] = activation(gate[i]) * up[i]; in kClampedSwiglu, gpt-oss' one, * (up[i] + 1). A multiple of 16 values.
    void (*activate)(float *gate, const float *up, int64_t values, Activation);
    // out[i] = the sum of weights[j] * rows[j][i] over `chosen`, in that order; a row that is null is left out.
    void (*combine)(const float *const *rows, const float *weights, int64_t chosen, int64_t values, void *out, DType);
};

extern const Vectors kAvx2Vectors;
extern const Vectors kAvx512Vectors;

} // namespace experts

// A call; docs/kernels.md has the shapes' names.
struct ExpertsCall {
    const void *x;             // [tokens, hidden] of dtype
    const uint8_t *gate_up;    // packed weights of every expert [2 * intermediate, hidden], one after the other: 32 rows
                               // of the gate, 32 of up, and so on
    const uint8_t *down;       // likewise [hidden, intermediate]
    const float *gate_up_bias; // [experts, 2 * intermediate] in the order of gate_up's rows, or null
    const float *down_bias;    // [experts, hidden], or null
    const float *weights;      // [tokens, chosen]: what each chosen expert's result counts for
    const int32_t *ids;        // [tokens, chosen]; one that is no expert's is left out
    void *out;                 // [tokens, hidden] of dtype
    int64_t tokens, chosen, experts, hidden;
    int64_t intermediate;      // a multiple of 32
    int64_t gate_up_group, down_group; // inputs that share a scale, as w4a8 and w8a8 have them
    int32_t bits;              // 4 or 8
    int32_t symmetric;
    int32_t dtype, activation;
    int32_t isa;               // common::Isa; kNone for the best one
    int32_t threads;
};

#pragma GCC visibility push(default)
extern "C" {
// Returns 0, or -1 when there is no memory for what lies between the steps.
int32_t experts_forward(const ExpertsCall *call);
}
#pragma GCC visibility pop
