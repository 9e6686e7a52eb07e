// What is computed beside the matmuls, over a vector type V; each instruction set's file instantiates it. All operations
// are ones that IEEE 754 defines, fused multiplications written as such: every set gives the same bits.
#pragma once

#include <initializer_list>

#include "common/tile.h"
#include "experts/experts.h"

namespace experts {
namespace {

// exp(x), within 2 units in the last place: 2^n times a polynomial (Taylor's to the 7th power) of what n leaves of x.
template <class V> typename V::F exponential(typename V::F x) {
    using F = typename V::F;
    x = V::min(V::max(x, V::constant(-87.0f)), V::constant(88.0f));
    // Added to 1.5 * 2^23, a number is rounded to an integer, which is in the low bits.
    const F magic = V::constant(12582912.0f), shifted = V::fma(x, V::constant(1.44269504f), magic);
    const F n = V::add(shifted, V::constant(-12582912.0f));
    F r = V::fma(n, V::constant(-0.693359375f), x); // ln 2 in two parts, of which the first is exact times n
    r = V::fma(n, V::constant(2.12194440e-4f), r);
    F sum = V::constant(1.0f / 5040);
    for (const float factor : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
        sum = V::fma(sum, r, V::constant(factor));
    return V::scale_by_power_of_two(sum, shifted);
}

template <class V> typename V::F sigmoid(typename V::F x) {
    const typename V::F one = V::constant(1.0f);
    return V::div(one, V::add(one, exponential<V>(V::negate(x))));
}

// erf(x) within 1.5e-7: Abramowitz and Stegun, 7.1.26.
template <class V> typename V::F error_function(typename V::F x) {
    using F = typename V::F;
    const F one = V::constant(1.0f), magnitude = V::max(x, V::negate(x));
    const F t = V::div(one, V::fma(magnitude, V::constant(0.3275911f), one));
    F sum = V::constant(1.061405429f);
    for (const float factor : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f})
        sum = V::fma(sum, t, V::constant(factor));
    const F tail = V::mul(V::mul(sum, t), exponential<V>(V::mul(V::negate(x), x)));
    const F result = V::add(one, V::negate(tail));
    return V::with_sign_of(result, x);
}

template <class V, Activation A> typename V::F activated(typename V::F gate, typename V::F up) {
    using F = typename V::F;
    if constexpr (A == kSilu) return V::mul(V::mul(gate, sigmoid<V>(gate)), up);
    if constexpr (A == kGelu) {
        const F half = V::mul(gate, V::constant(0.5f));
        return V::mul(V::fma(half, error_function<V>(V::mul(gate, V::constant(0.70710678f))), half), up);
    }
    if constexpr (A == kGeluTanh) { // (1 + tanh(z)) / 2 is the sigmoid of 2 z
        const F cube = V::mul(V::mul(gate, gate), gate);
        const F z = V::mul(V::fma(cube, V::constant(0.044715f), gate), V::constant(1.59576912f));
        return V::mul(V::mul(gate, sigmoid<V>(z)), up);
    }
    if constexpr (A == kClampedSwiglu) {
        const F limit = V::constant(7.0f);
        gate = V::min(gate, limit);
        up = V::max(V::min(up, limit), V::constant(-7.0f));
        const F glu = V::mul(gate, sigmoid<V>(V::mul(gate, V::constant(1.702f))));
        return V::fma(glu, up, glu);
    }
}

template <class V, Activation A> void activate_all(float *gate, const float *up, int64_t values) {
    for (int64_t i = 0; i < values; i += V::lanes)
        V::store_float(gate + i, activated<V, A>(V::load_float(gate + i), V::load_float(up + i)));
}

template <class V> void activate(float *gate, const float *up, int64_t values, Activation activation) {
    const auto all = activation == kSilu       ? activate_all<V, kSilu>
                     : activation == kGelu     ? activate_all<V, kGelu>
                     : activation == kGeluTanh ? activate_all<V, kGeluTanh>
                                               : activate_all<V, kClampedSwiglu>;
    all(gate, up, values);
}

template <class V>
void combine(const float *const *rows, const float *weights, int64_t chosen, int64_t values, void *out, DType dtype) {
    for (int64_t i = 0; i < values; i += V::lanes) {
        const int64_t count = values - i < V::lanes ? values - i : V::lanes;
        alignas(64) float last[V::lanes] = {};
        typename V::F sum = V::constant(0.0f);
        for (int64_t j = 0; j < chosen; ++j) {
            if (!rows[j]) continue;
            const float *from = rows[j] + i;
            if (count < V::lanes) from = static_cast<const float *>(std::memcpy(last, from, count * 4));
            sum = V::fma(V::constant(weights[j]), V::load_float(from), sum);
        }
        const int64_t element = common::element_bytes(dtype);
        char *to = static_cast<char *>(out) + i * element;
        if (count == V::lanes) {
            common::store<V>(to, dtype, 0, sum);
        } else {
            alignas(64) char part[V::lanes * 4];
            common::store<V>(part, dtype, 0, sum);
            std::memcpy(to, part, count * element);
        }
    }
}

} // namespace
} // namespace experts
