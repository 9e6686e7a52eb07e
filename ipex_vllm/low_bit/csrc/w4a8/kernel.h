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

// The levels, each repeated in every 16 bytes of a vector, where a shuffle finds them.
alignas(16) constexpr int8_t kNf4Levels[16] = {-127, -88, -67, -50, -36, -23, -12, 0, 10, 20, 31, 43, 56, 71, 92, 127};
alignas(16) constexpr int8_t kFp4Levels[16] = {-12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12, 0};

template <Table T> __m128i levels() {
    return _mm_load_si128(reinterpret_cast<const __m128i *>(T == kNf4 ? kNf4Levels : kFp4Levels));
}

// call(vectors, layout) with the types that multiply such weights: V, or a Lookup of the weights' table.
template <class V, template <Table> class Lookup, class Call> void with_types(const Weights &w, const Call &call) {
    with_layout(w, [&](auto layout) {
        if constexpr (decltype(layout)::terms == 1) {
            if (w.table == kNf4) return call(Lookup<kNf4>(), layout);
            if (w.table == kFp4) return call(Lookup<kFp4>(), layout);
        }
        call(V(), layout);
    });
}

template <class V, template <Table> class Lookup>
void multiply(const Weights &w, const Activations &a, const Output &out, int64_t tile, int64_t begin, int64_t end) {
    with_types<V, Lookup>(w, [&](auto vectors, auto layout) {
        common::multiply_tile<decltype(vectors), decltype(layout)>({w.packed, w.outputs, w.groups()}, a, out, tile,
                                                                   begin, end);
    });
}

template <class V, template <Table> class Lookup>
void quantize(const void *x, DType dtype, const Weights &w, const Activations &a, int64_t row) {
    const int zero = w.table ? Lookup<kNf4>::weight_of_zero : w.symmetric ? 8 : 0;
    common::quantize_row<V>(x, dtype, w.inputs, w.step(), zero, a, row);
}

} // namespace
} // namespace w4a8
