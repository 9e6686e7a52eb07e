// The kernel over a vector type V; each instruction set's file instantiates it.
#pragma once

#include "common/int8_kernel.h"
#include "w4a8/w4a8.h"

namespace w4a8 {
namespace {

template <int Group, bool Symmetric> using Layout = common::Layout<4, Group, Symmetric ? 1 : 2>;

// call(layout) with the weights' packed layout as a type.
template <class Call> void with_layout(const Weights &w, const Call &call) {
    if (w.group == 32) return w.symmetric ? call(Layout<32, true>()) : call(Layout<32, false>());
    if (w.group == 64) return w.symmetric ? call(Layout<64, true>()) : call(Layout<64, false>());
    return w.symmetric ? call(Layout<128, true>()) : call(Layout<128, false>());
}

template <class V>
void multiply(const Weights &w, const Activations &a, const Output &out, int64_t tile, int64_t begin, int64_t end) {
    with_layout(w, [&](auto layout) {
        common::multiply_tile<V, decltype(layout)>({w.packed, w.outputs, w.groups()}, a, out, tile, begin, end);
    });
}

template <class V> void quantize(const void *x, DType dtype, const Weights &w, const Activations &a, int64_t row) {
    common::quantize_row<V>(x, dtype, w.inputs, w.step(), w.symmetric ? 8 : 0, a, row);
}

} // namespace
} // namespace w4a8
