// Groups of weights to integers, and the scale of least weighted squared error: the C interface, and what its files
// share. The arithmetic is that of rounding.py, operation for operation.
#pragma once

#include "common/types.h"

// A call.
struct RoundingCall {
    const float *values;     // [rows, groups, size]
    const float *importance; // [groups, size]: what the squared error of an input counts for; null for rms + |value|
    const float *tried;      // [candidates]: what the first scale is divided by; without symmetry, a step's part of the
                             // group's range
    uint8_t *codes;          // [rows, groups, size]; int8 where `bits` is 8
    void *scales;            // [rows, groups]: float16, float32 where `bits` is 8
    uint16_t *mins;          // [rows, groups]: float16; null for symmetric codes
    int64_t rows, groups, size, candidates;
    int32_t bits;            // of a code: 4, 5, or 8 if it is symmetric
    int32_t isa;             // rounding::Isa
    int32_t threads;
};

namespace rounding {

enum Isa : int32_t { kNone = 0, kAvx2 = 1, kAvx512 = 2 };

constexpr int kBlock = 16; // floats that are added in pairs at the end of a sum; a group is padded to whole blocks
constexpr int kArrays = 5; // of a padded group, between the steps

// Rounds the groups [begin, end) of all rows'; `scratch` has kArrays padded groups.
using Round = void (*)(const RoundingCall &, int64_t begin, int64_t end, float *scratch);

void round_avx2(const RoundingCall &, int64_t begin, int64_t end, float *scratch);
void round_avx512(const RoundingCall &, int64_t begin, int64_t end, float *scratch);

} // namespace rounding

#pragma GCC visibility push(default)
extern "C" {
// The best instruction set of this CPU (rounding::Isa); kNone when there is none to run on.
int32_t rounding_isa();

// Returns 0, or -1 when there is no memory for what lies between the steps.
int32_t rounding_round(const RoundingCall *call);
}
#pragma GCC visibility pop
