// A layer of experts: each token goes through the few that were chosen for it. The C interface, and what its files share.
// docs/kernels.md explains the steps.
#pragma once

#include <type_traits>

#include "common/types.h"
#include "w4a8/w4a8.h"
#include "w8a16/w8a16.h"
#include "w8a8/w8a8.h"

namespace experts {

using common::DType;

// What the weights are, and so which matmul computes them: w4a8 (the first four), w8a8 or w8a16.
enum Format : int32_t { kSymInt4 = 0, kAsymInt4 = 1, kNf4 = 2, kFp4 = 3, kInt8 = 4, kE4M3 = 5, kE5M2 = 6 };

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
    int64_t gate_up_group, down_group; // inputs that share a scale, as the matmul has them
    int32_t gate_up_format, down_format; // both of integers, or both of 8-bit floats
    int32_t dtype, activation;
    int32_t isa;               // the matmul's, common::Isa or w8a16::Isa; kNone for the best one
    int32_t threads;
};

namespace experts {

inline int64_t tile_bytes(const w4a8::Weights &w) { return w.groups() * w.block_bytes(); }
inline int64_t tile_bytes(const w8a8::Weights &w) { return w.tile_bytes(); }
inline int64_t tile_bytes(const w8a16::Weights &w) { return w.groups() * w.block_bytes(); }

// call(weights) with weights of a format, as their matmul takes them.
template <class Call>
int32_t with_format(int32_t format, const uint8_t *packed, int64_t outputs, int64_t inputs, int64_t group,
                    const Call &call) {
    if (format >= kE4M3)
        return call(w8a16::Weights{packed, outputs, inputs, group, format == kE4M3 ? w8a16::kE4M3 : w8a16::kE5M2});
    if (format == kInt8) return call(w8a8::Weights{packed, outputs, inputs, group});
    const auto table = format == kNf4 ? w4a8::kNf4 : format == kFp4 ? w4a8::kFp4 : w4a8::kIntegers;
    return call(w4a8::Weights{packed, outputs, inputs, group, format != kAsymInt4, table});
}

// call(gate_up, down) with the weights of the first expert; -2 where one is of integers and the other of floats.
template <class Call> int32_t with_weights(const ExpertsCall &c, const Call &call) {
    return with_format(c.gate_up_format, c.gate_up, 2 * c.intermediate, c.hidden, c.gate_up_group, [&](auto gate_up) {
        return with_format(c.down_format, c.down, c.hidden, c.intermediate, c.down_group, [&](auto down) -> int32_t {
            constexpr bool is_float = std::is_same_v<decltype(gate_up), w8a16::Weights>;
            if constexpr (is_float == std::is_same_v<decltype(down), w8a16::Weights>) return call(gate_up, down);
            return -2;
        });
    });
}

} // namespace experts

#pragma GCC visibility push(default)
extern "C" {
// Returns 0, or -1 when there is no memory for what lies between the steps.
int32_t experts_forward(const ExpertsCall *call);
}
#pragma GCC visibility pop
