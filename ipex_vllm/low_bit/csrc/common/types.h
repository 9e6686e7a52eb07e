// What every matmul of the library is called with.
#pragma once

#include <cstdint>

namespace common {

constexpr int kCacheLine = 64;
constexpr int kTileOutputs = 32;   // outputs in one tile of packed weights
constexpr int kMaxTaskRows = 128;  // rows in one task: their sums stay in the first- or second-level cache
constexpr int kPrefetchBytes = 4096; // how far ahead a tile is fetched when it is used only once

bool is_intel(); // whether this CPU is one of Intel's

enum DType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

inline int64_t element_bytes(DType dtype) { return dtype == kFloat32 ? 4 : 2; }

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

constexpr int kFloatRowPadding = 16; // numbers between rows of activations, so that rows do not meet in the same cache set

// Numbers from one row of activations to the next, so that each holds `inputs` and zeros up to whole vectors.
inline int64_t float_row_stride(int64_t inputs) { return round_up(inputs, 16) + kFloatRowPadding; }

struct Output {
    void *data; // [rows, outputs] of dtype
    DType dtype;
    const void *bias; // [outputs] of bias_dtype, or null
    DType bias_dtype;
};

} // namespace common
