// Integer weights times activations that are rounded to int8 in groups: what the kernels for them share.
// docs/kernels.md explains the arithmetic.
#pragma once

#include "common/types.h"

namespace common {

constexpr int kTermBytes = 64;   // 32 float16 scales (or minima): one per output of the tile
constexpr int kRowPadding = 64;  // bytes between quantized rows, so that rows do not meet in the same cache set
constexpr int kAmxRows = 16;     // rows that AMX multiplies at once
constexpr int kLargestStep = 64; // inputs that share a scale of the activations, at most

// How a sum of products begins, so that its bits, read as a float32, are 1.5 * 2^23 + sum; or 1.5 * 2^19 + sum / 16.
constexpr int32_t kStart[2] = {0x4b400000, 0x49400000};
constexpr float kOffset[2] = {12582912.0f, 786432.0f};

enum Isa : int32_t { kNone = 0, kAvx2 = 1, kAvxVnni = 2, kAvx512Vnni = 3, kAmx = 4 };

// The best instruction set of this CPU, with AMX or without; kNone when there is none to run on.
Isa best_isa(bool with_amx);

// What a group of a quantized row brings to each output: x ~ scale * codes.
struct GroupTerms {
    int32_t start[2]; // kStart, less the product with the code that stands for a weight of 0 (that times 16)
    float scale;      // 22 bits of mantissa, so that the next is exact
    float offset[2];  // -kOffset * scale
    float sum;        // scale * sum(codes)
};

struct Activations {
    int8_t *codes; // [rows + kAmxRows - 1, stride]
    GroupTerms *terms; // [rows, groups]
    int64_t stride;
    int64_t groups;
};

} // namespace common
