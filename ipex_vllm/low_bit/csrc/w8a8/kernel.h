// The kernel over a vector type V; each instruction set's file instantiates it.
#pragma once

#include "common/int8_kernel.h"
#include "w8a8/w8a8.h"

namespace w8a8 {
namespace {

// call(layout) with the weights' packed layout as a type.
template <class Call> void with_layout(const Weights &w, const Call &call) {
    if (w.group == 32) return call(common::Layout<8, 32, 1>());
    return w.group == 64 ? call(common::Layout<8, 64, 1>()) : call(common::Layout<8, common::kLargestStep, 0>());
}

template <class V>
void multiply(const Weights &w, const Activations &a, const Output &out, int64_t tile, int64_t begin, int64_t end) {
    with_layout(w, [&](auto layout) {
        common::multiply_tile<V, decltype(layout)>({w.packed, w.outputs, w.blocks()}, a, out, tile, begin, end);
    });
}

template <class V> void quantize(const void *x, DType dtype, const Weights &w, const Activations &a, int64_t row) {
    common::quantize_row<V>(x, dtype, w.inputs, w.step(), V::weight_of_zero, a, row);
}

} // namespace
} // namespace w8a8
