// Runs every fp8 kernel this CPU can run against a plain loop, on buffers of exactly the needed size: under
// AddressSanitizer a read or write past an end stops it. With float32 activations the results have to be the same
// bits; kAvx512Bf16 adds in an order of its own.
#include "w8a16/w8a16.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <random>
#include <utility>
#include <vector>

using namespace w8a16;

static float number(uint8_t code, Format format) {
    const int mantissa_bits = format == kE4M3 ? 3 : 2, lowest = format == kE4M3 ? -17 : -16; // e4m3 is 2^-8 of it
    const int exponent = (code & 127) >> mantissa_bits, mantissa = code & ((1 << mantissa_bits) - 1);
    const int implicit = exponent ? 1 << mantissa_bits : 0;
    const float value = std::ldexp(float(mantissa + implicit), lowest + (exponent ? exponent - 1 : 0));
    return code & 128 ? -value : value;
}

static float bfloat16(uint16_t value) {
    const uint32_t bits = uint32_t(value) << 16;
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
}

// As the kernels add: a group's even and its odd inputs, both together, and that scaled to what the groups before gave.
// The second result is the sum of the magnitudes.
static std::vector<float> reference(const std::vector<float> &x, const Weights &w, const std::vector<float> &bias,
                                    int64_t rows, std::vector<float> &magnitudes) {
    std::vector<float> out(rows * w.outputs);
    const int64_t group = w.group ? w.group : w.inputs;
    for (int64_t m = 0; m < rows; ++m)
        for (int64_t n = 0; n < w.outputs; ++n) {
            float sum = 0, magnitude = std::fabs(bias[n]);
            for (int64_t g = 0; g < w.groups(); ++g) {
                const uint8_t *block = w.block(n / kTileOutputs, g);
                float sums[2] = {0, 0}, scale;
                std::memcpy(&scale, block + n % kTileOutputs * 4, 4);
                for (int64_t k = 0; k < group; ++k) {
                    const uint8_t *line = block + kScalesBytes + k / 2 * kLineBytes;
                    const float value = number(line[n % 16 * 4 + k % 2 * 2 + n % kTileOutputs / 16], w.format);
                    const float input = x[m * w.inputs + g * group + k];
                    sums[k % 2] = std::fma(value, input, sums[k % 2]);
                    magnitude += std::fabs(value * input) * scale;
                }
                const bool is_last = g + 1 == w.groups();
                sum = std::fma(scale, sums[0] + sums[1], is_last ? sum + bias[n] : sum);
            }
            magnitudes[m * w.outputs + n] = magnitude;
            out[m * w.outputs + n] = sum;
        }
    return out;
}

int main() {
    std::mt19937 random(0);
    std::normal_distribution<float> normal;
    std::vector<int> isas{kAvx2};
    if (w8a16_isa(common::kFloat32) == kAvx512) isas.push_back(kAvx512);
    if (w8a16_isa(common::kBFloat16) == kAvx512Bf16) isas.push_back(kAvx512Bf16);
    // The inputs, and how many of them share a scale.
    const std::pair<int64_t, int64_t> sizes[] = {{1, 0},   {2, 0},   {15, 0},   {16, 0},   {17, 0},     {255, 0},
                                                 {256, 0}, {257, 0}, {1152, 0}, {192, 32}, {1152, 128}};
    int checked = 0;
    for (const Format format : {kE4M3, kE5M2})
        for (const int64_t outputs : {1, 31, 32, 33, 80})
            for (const auto &[inputs, group] : sizes)
                for (const int64_t rows : {1, 2, 5, 6, 7, 12, 13, 25, 129}) {
                    Weights w{nullptr, outputs, inputs, group, format};
                    std::vector<uint8_t> packed(w.tiles() * w.groups() * w.block_bytes());
                    for (auto &byte : packed)
                        do byte = random();
                        while ((byte & 127) >= (format == kE4M3 ? 127 : 124)); // numbers
                    w.packed = packed.data();
                    for (int64_t block = 0; block < w.tiles() * w.groups(); ++block)
                        for (int n = 0; n < kTileOutputs; ++n) {
                            const float scale = std::fabs(normal(random));
                            std::memcpy(packed.data() + block * w.block_bytes() + n * 4, &scale, 4);
                        }
                    std::vector<uint16_t> narrow(rows * inputs);
                    std::vector<float> x(rows * inputs), bias(outputs), out(rows * outputs), magnitudes(out.size());
                    for (size_t i = 0; i < x.size(); ++i) {
                        const float value = normal(random);
                        uint32_t bits;
                        std::memcpy(&bits, &value, 4);
                        narrow[i] = bits >> 16;
                        x[i] = bfloat16(narrow[i]);
                    }
                    for (auto &value : bias) value = rows % 2 ? normal(random) : 0;
                    const auto expected = reference(x, w, bias, rows, magnitudes);
                    for (const int isa : isas)
                        for (const int threads : {1, 3}) {
                            const bool is_narrow = isa == kAvx512Bf16;
                            std::vector<uint16_t> narrow_out(is_narrow ? out.size() : 0);
                            const void *from = is_narrow ? static_cast<const void *>(narrow.data()) : x.data();
                            void *to = is_narrow ? static_cast<void *>(narrow_out.data()) : out.data();
                            const int dtype = is_narrow ? common::kBFloat16 : common::kFloat32;
                            std::fill(out.begin(), out.end(), NAN);
                            bool right = !w8a16_linear(from, packed.data(), rows % 2 ? bias.data() : nullptr, to, rows,
                                                       outputs, inputs, group, format, dtype, common::kFloat32, isa, threads);
                            if (is_narrow)
                                for (size_t i = 0; i < out.size(); ++i)
                                    right &= std::fabs(bfloat16(narrow_out[i]) - expected[i]) <=
                                             std::fabs(expected[i]) / 256 + magnitudes[i] * 2e-6f;
                            else
                                right &= !std::memcmp(out.data(), expected.data(), out.size() * 4);
                            if (!right) {
                                std::printf("isa %d: format %d, %ld x %ld, rows %ld differ\n", isa, format,
                                            long(outputs), long(inputs), long(rows));
                                return 1;
                            }
                            ++checked;
                        }
                }
    std::printf("%d results, %zu instruction sets\n", checked, isas.size());
}
