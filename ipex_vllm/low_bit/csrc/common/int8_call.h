// The whole of a call: rows are rounded, then multiplied with every tile.
#pragma once

#include "common/buffer.h"
#include "common/int8.h"
#include "common/parallel.h"

namespace common {

// Weights have `inputs`, `step()` (inputs that share a scale of the activations) and `tiles()`; a kernel `quantize` and
// `multiply`. Returns 0, or -1 when there is no memory for the quantized rows.
template <class Kernel, class Weights>
int32_t multiply_rows(const Kernel &kernel, const Weights &weights, const void *x, const Output &output, int64_t rows,
                      int32_t threads) {
    const int64_t groups = (weights.inputs + weights.step() - 1) / weights.step();
    const int64_t stride = round_up(groups * weights.step(), kCacheLine) + kRowPadding;
    const int64_t codes_bytes = round_up((rows + kAmxRows - 1) * stride, kCacheLine);
    const Buffer buffer = allocate(codes_bytes + rows * groups * int64_t(sizeof(GroupTerms)));
    if (!buffer) return -1;
    const Activations activations{reinterpret_cast<int8_t *>(buffer.get()),
                                  reinterpret_cast<GroupTerms *>(buffer.get() + codes_bytes), stride, groups};
    prepare_and_multiply(
        rows, weights.tiles(), threads,
        [&](int64_t row) { kernel.quantize(x, output.dtype, weights, activations, row); },
        [&](int64_t tile, int64_t begin, int64_t end) {
            kernel.multiply(weights, activations, output, tile, begin, end);
        });
    return 0;
}

} // namespace common
