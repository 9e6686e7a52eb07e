// The search, over a vector type V; each instruction set's file instantiates it. All operations are ones that IEEE 754
// defines, none of them fused, and a sum has one order: every set gives the same bits, on any number of threads. As in
// common/tile.h, everything is in an unnamed namespace.
#pragma once

#include <cfloat>
#include <cstring>

#include "rounding/rounding.h"

// So that the length of a group is a constant where it is one.
#define ALWAYS_INLINE inline __attribute__((always_inline))

namespace rounding {
namespace {

// A group, padded with weights of 0, and what becomes of it on the way: arrays of n floats each.
struct Group {
    float *values, *weights, *weighted, *dots, *squares;
    int64_t size, n; // without and with the padding
};

// The sum of n floats, a multiple of kBlock, which are overwritten. The second half of the blocks is added to the first
// until one is left; within it likewise.
template <class V> ALWAYS_INLINE float sum(float *values, int64_t n) {
    while (n > kBlock) {
        const int64_t half = (n / kBlock + 1) / 2 * kBlock;
        for (int64_t i = half; i < n; i += V::lanes)
            V::store_float(values + i - half, V::add(V::load_float(values + i - half), V::load_float(values + i)));
        n = half;
    }
    return V::sum_block(values);
}

inline void fill(float *from, float *to, float value) {
    while (from < to) *from++ = value;
}

// A denormal scale has no finite inverse; its group becomes zeros.
inline float inverse_of(float scale) { return __builtin_fabsf(scale) < FLT_MIN ? 0.0f : 1.0f / scale; }

inline float at_least(float value, float least) { return value < least ? least : value; } // NaN stays NaN

// `value` rounded to float16, which is written to `to`.
template <class V> float rounded_to_half(float value, uint16_t *to) {
    uint16_t halves[V::lanes];
    alignas(64) float floats[V::lanes];
    V::store_half(halves, V::constant(value));
    V::store_float(floats, V::load_half(halves));
    *to = halves[0];
    return floats[0];
}

// Codes of the integers nearest to value * inverse: from 0 to `highest` with ties up, and 8 bits with ties to even.
template <class V> struct Integers {
    typename V::F zero, offset, lowest, highest; // the code of 0, and what is added before rounding down
    bool is_int8;

    Integers(int bits, float zero_code)
        : zero(V::constant(bits == 8 ? 0 : zero_code)), offset(V::constant(zero_code + 0.5f)),
          lowest(V::constant(bits == 8 ? -128.0f : 0.0f)), highest(V::constant(bits == 8 ? 127.0f : (1 << bits) - 1)),
          is_int8(bits == 8) {}

    typename V::F codes(typename V::F values, typename V::F inverse) const {
        const typename V::F scaled = V::mul(values, inverse);
        const typename V::F rounded = is_int8 ? V::nearest(scaled) : V::floor(V::add(scaled, offset));
        return V::min(V::max(rounded, lowest), highest);
    }
    typename V::F numbers(typename V::F values, typename V::F inverse) const {
        return V::sub(codes(values, inverse), zero);
    }
};

// The value of largest magnitude, the first of those that are as large, with its sign. A NaN is larger than all others.
template <class V> ALWAYS_INLINE float extreme(const Group &g) {
    typename V::F largest = V::constant(0.0f);
    for (int64_t i = 0; i < g.n; i += V::lanes)
        largest = V::larger_bits(largest, V::magnitude(V::load_float(g.values + i)));
    largest = V::constant_of_largest_bits(largest);
    for (int64_t i = 0;; i += V::lanes)
        if (const uint32_t found = V::equal_bits(V::magnitude(V::load_float(g.values + i)), largest))
            return g.values[i + __builtin_ctz(found)];
}

template <class V>
ALWAYS_INLINE float search_symmetric(const RoundingCall &c, const Integers<V> &integers, const Group &g) {
    const float first = extreme<V>(g) / -float(1 << (c.bits - 1));
    float scale = first / c.tried[0], most = -1; // a NaN stays one, to be refused, and so does what has no square
    for (int64_t candidate = 0; candidate < c.candidates; ++candidate) {
        const auto inverse = V::constant(inverse_of(first / c.tried[candidate]));
        for (int64_t i = 0; i < g.n; i += V::lanes) {
            const auto numbers = integers.numbers(V::load_float(g.values + i), inverse);
            V::store_float(g.dots + i, V::mul(numbers, V::load_float(g.weighted + i)));
            V::store_float(g.squares + i, V::mul(numbers, V::mul(numbers, V::load_float(g.weights + i))));
        }
        const float dot = sum<V>(g.dots, g.n), best = dot / at_least(sum<V>(g.squares, g.n), 1e-30f);
        if (dot * best > most) {
            most = dot * best;
            scale = best;
        }
    }
    return scale;
}

template <class V>
ALWAYS_INLINE void search_asymmetric(const RoundingCall &c, const Integers<V> &integers, const Group &g, float &scale,
                                     float &min) {
    float low = g.values[0], high = low;
    for (int64_t i = 0; i < g.n; ++i) {
        low = g.values[i] < low ? g.values[i] : low;
        high = g.values[i] > high ? g.values[i] : high;
    }
    const auto total_of = [&](const float *array) {
        std::memcpy(g.dots, array, g.n * 4);
        return sum<V>(g.dots, g.n);
    };
    const float total = total_of(g.weighted), count = at_least(total_of(g.weights), 1e-30f);
    const float highest = float((1 << c.bits) - 1), middle = (high + low) / 2;
    scale = total != total ? total : (high - low) / highest; // a NaN is refused
    min = low;
    float most = -1;
    for (int64_t candidate = 0; candidate < c.candidates; ++candidate) {
        const float step = (high - low) * c.tried[candidate], start = middle - step * (highest / 2);
        const auto inverse = V::constant(inverse_of(step)), from = V::constant(start);
        const auto codes = [&](int64_t i) { return integers.codes(V::sub(V::load_float(g.values + i), from), inverse); };
        for (int64_t i = 0; i < g.n; i += V::lanes) {
            const auto heavy = V::mul(codes(i), V::load_float(g.weights + i));
            V::store_float(g.squares + i, heavy);
            V::store_float(g.dots + i, V::mul(codes(i), V::load_float(g.weighted + i)));
        }
        const float dot = sum<V>(g.dots, g.n);
        for (int64_t i = 0; i < g.n; i += V::lanes)
            V::store_float(g.dots + i, V::mul(codes(i), V::load_float(g.squares + i)));
        const float square = sum<V>(g.dots, g.n), codes_total = sum<V>(g.squares, g.n);
        // Least squares of weight on code: slope and intercept, and the part of the squares that they explain.
        const float spread = at_least(count * square - codes_total * codes_total, 1e-30f);
        const float slope = (count * dot - codes_total * total) / spread;
        const float intercept = (total - slope * codes_total) / count;
        const float explained = slope * dot + intercept * total;
        if (explained > most) {
            most = explained;
            scale = slope;
            min = intercept;
        }
    }
}

// g.weights and g.weighted; the padding weighs nothing.
template <class V> ALWAYS_INLINE void weigh(const RoundingCall &c, int64_t group, const Group &g) {
    if (c.importance) {
        std::memcpy(g.weights, c.importance + group * g.size, g.size * 4);
    } else {
        for (int64_t i = 0; i < g.n; i += V::lanes)
            V::store_float(g.dots + i, V::mul(V::load_float(g.values + i), V::load_float(g.values + i)));
        fill(g.dots + g.size, g.dots + g.n, 0.0f);
        const auto rms = V::constant(__builtin_sqrtf(sum<V>(g.dots, g.n) / float(g.size)));
        for (int64_t i = 0; i < g.n; i += V::lanes)
            V::store_float(g.weights + i, V::add(rms, V::magnitude(V::load_float(g.values + i))));
    }
    fill(g.weights + g.size, g.weights + g.n, 0.0f);
    for (int64_t i = 0; i < g.n; i += V::lanes)
        V::store_float(g.weighted + i, V::mul(V::load_float(g.values + i), V::load_float(g.weights + i)));
}

// The groups [begin, end), of N values, or of any number where N is 0.
template <class V, int N> void round_groups(const RoundingCall &c, int64_t begin, int64_t end, float *scratch) {
    const int64_t size = N ? N : c.size, n = common::round_up(size, kBlock);
    const Group g{scratch, scratch + n, scratch + 2 * n, scratch + 3 * n, scratch + 4 * n, size, n};
    const Integers<V> integers(c.bits, c.mins ? 0.0f : float(1 << (c.bits - 1)));
    for (int64_t group = begin; group < end; ++group) {
        std::memcpy(g.values, c.values + group * size, size * 4);
        fill(g.values + size, g.values + n, g.values[0]);
        weigh<V>(c, group % c.groups, g);
        float scale, min = 0;
        if (c.mins) {
            search_asymmetric<V>(c, integers, g, scale, min);
            min = rounded_to_half<V>(min, c.mins + group);
        } else {
            scale = search_symmetric<V>(c, integers, g);
        }
        if (c.bits == 8)
            static_cast<float *>(c.scales)[group] = scale;
        else
            scale = rounded_to_half<V>(scale, static_cast<uint16_t *>(c.scales) + group);
        const auto inverse = V::constant(inverse_of(scale)), from = V::constant(min);
        auto *codes = reinterpret_cast<uint8_t *>(g.dots);
        for (int64_t i = 0; i < n; i += V::lanes)
            V::store_bytes(codes + i, integers.codes(V::sub(V::load_float(g.values + i), from), inverse));
        std::memcpy(c.codes + group * size, codes, size);
    }
}

template <class V> void round_any(const RoundingCall &c, int64_t begin, int64_t end, float *scratch) {
    const auto round = c.size == 32    ? round_groups<V, 32>
                       : c.size == 64  ? round_groups<V, 64>
                       : c.size == 128 ? round_groups<V, 128>
                                       : round_groups<V, 0>;
    round(c, begin, end, scratch);
}

} // namespace
} // namespace rounding
