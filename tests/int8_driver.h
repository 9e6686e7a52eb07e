// What the drivers of the kernels with int8 activations share.
#pragma once

#include "common/int8.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <random>
#include <vector>

static float half_at(const uint8_t *p) {
    uint16_t h;
    std::memcpy(&h, p, 2);
    const int exponent = h >> 10 & 31, mantissa = h & 1023;
    const float value = exponent ? std::ldexp(float(mantissa + 1024), exponent - 25) : std::ldexp(float(mantissa), -24);
    return h >> 15 ? -value : value;
}

// The instruction sets that a CPU has with its best one.
static std::vector<int> known_isas(int best) {
    std::vector<int> isas{common::kAvx2};
    if (__builtin_cpu_supports("avxvnni") || best >= common::kAvx512Vnni) isas.push_back(common::kAvxVnni);
    if (best >= common::kAvx512Vnni) isas.push_back(common::kAvx512Vnni);
    if (best == common::kAmx) isas.push_back(common::kAmx);
    return isas;
}

// Rows as the kernels round them, `step` inputs at a time.
struct RoundedRows {
    int64_t groups;

    RoundedRows(const std::vector<float> &x, int64_t rows, int64_t inputs, int64_t step)
        : groups((inputs + step - 1) / step), inputs_(inputs), codes_(rows * inputs), scales_(rows * groups) {
        for (int64_t m = 0; m < rows; ++m)
            for (int64_t g = 0; g < groups; ++g) {
                const int64_t first = m * inputs + g * step, end = m * inputs + std::min(inputs, (g + 1) * step);
                float amax = 0;
                for (int64_t i = first; i < end; ++i) amax = std::fmax(amax, std::fabs(x[i]));
                const bool zero = amax < 0x1p-100f;
                for (int64_t i = first; i < end; ++i)
                    codes_[i] = zero ? 0 : int(std::nearbyint(x[i] * (127.0f / amax)));
                // Cut to 22 bits.
                int exponent;
                const float mantissa = std::frexp(zero ? 0 : amax / 127.0f, &exponent);
                scales_[m * groups + g] = std::ldexp(std::floor(std::ldexp(mantissa, 22)), exponent - 22);
            }
    }
    int code(int64_t row, int64_t input) const { return codes_[row * inputs_ + input]; }
    float scale(int64_t row, int64_t group) const { return scales_[row * groups + group]; }

  private:
    int64_t inputs_;
    std::vector<int> codes_;
    std::vector<float> scales_;
};
