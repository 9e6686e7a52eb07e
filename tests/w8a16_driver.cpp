// Runs every fp8 kernel this CPU can run against a plain loop, on buffers of exactly the needed size: under
// AddressSanitizer a read or write past an end stops it. With float32 activations the results have to be the same
// bits; kAvx512Bf16 adds in an order of its own.
#include "w8a16/w8a16.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <random>
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

// As the kernels add: the even and the odd inputs, then both. The second result is the sum of the magnitudes.
static std::vector<float> reference(const std::vector<float> &x, const Weights &w, const std::vector<float> &bias,
                                    int64_t rows, std::vector<float> &magnitudes) {
    std::vector<float> out(rows * w.outputs);
    for (int64_t m = 0; m < rows; ++m)
        for (int64_t n = 0; n < w.outputs; ++n) {
            const uint8_t *tile = w.tile(n / kTileOutputs);
            float sums[2] = {0, 0}, magnitude = 0, scale;
            std::memcpy(&scale, tile + n % kTileOutputs * 4, 4);
            for (int64_t k = 0; k < w.inputs; ++k) {
                const uint8_t *line = tile + kScalesBytes + k / 2 * kLineBytes;
                const float value = number(line[n % 16 * 4 + k % 2 * 2 + n % kTileOutputs / 16], w.format);
                sums[k % 2] = std::fma(value, x[m * w.inputs + k], sums[k % 2]);
                magnitude += std::fabs(value * x[m * w.inputs + k]);
            }
            magnitudes[m * w.outputs + n] = magnitude * scale + std::fabs(bias[n]);
            out[m * w.outputs + n] = std::fma(scale, sums[0] + sums[1], bias[n]);
        }
    return out;
}

int main() {
    std::mt19937 random(0);
    std::normal_distribution<float> normal;
    std::vector<int> isas{kAvx2};
    if (w8a16_isa(common::kFloat32) == kAvx512) isas.push_back(kAvx512);
    if (w8a16_isa(common::kBFloat16) == kAvx512Bf16) isas.push_back(kAvx512Bf16);
    int checked = 0;
    for (const Format format : {kE4M3, kE5M2})
        for (const int64_t outputs : {1, 31, 32, 33, 80})
            for (const int64_t inputs : {1, 2, 15, 16, 17, 255, 256, 257, 1152})
                for (const int64_t rows : {1, 2, 5, 6, 7, 12, 13, 25, 129}) {
                    Weights w{nullptr, outputs, inputs, format};
                    std::vector<uint8_t> packed(w.tile(w.tiles()) - w.tile(0));
                    for (auto &byte : packed)
                        do byte = random();
                        while ((byte & 127) >= (format == kE4M3 ? 127 : 124)); // numbers
                    w.packed = packed.data();
                    for (int64_t n = 0; n < w.tiles() * kTileOutputs; ++n) {
                        const float scale = std::fabs(normal(random));
                        std::memcpy(packed.data() + (w.tile(n / kTileOutputs) - packed.data()) + n % kTileOutputs * 4,
                                    &scale, 4);
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
                                                       outputs, inputs, format, dtype, common::kFloat32, isa, threads);
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
