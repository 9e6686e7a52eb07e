// Runs every 16-bit kernel this CPU can run against a plain loop, on buffers of exactly the needed size: under
// AddressSanitizer a read or write past an end stops it. The results have to be the same bits.
#include "w16a16/w16a16.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

using namespace w16a16;

static float number(uint16_t word, DType dtype) {
    if (dtype == common::kBFloat16) {
        const uint32_t bits = uint32_t(word) << 16;
        float result;
        std::memcpy(&result, &bits, 4);
        return result;
    }
    const int exponent = word >> 10 & 31, mantissa = word & 1023;
    const float value = std::ldexp(float(mantissa + (exponent ? 1024 : 0)), (exponent ? exponent - 1 : 0) - 24);
    return word & 0x8000 ? -value : value;
}

int main() {
    std::mt19937 random(0);
    std::normal_distribution<float> normal;
    std::vector<int> isas{kAvx2};
    if (w16a16_isa() == kAvx512) isas.push_back(kAvx512);
    int checked = 0;
    for (const DType dtype : {common::kBFloat16, common::kFloat16})
        for (const int64_t outputs : {1, 31, 32, 33, 80})
            for (const int64_t inputs : {1, 2, 15, 16, 17, 127, 128, 129, 1152})
                for (const int64_t rows : {1, 2, 3, 6, 7, 12, 13, 25, 129}) {
                    Weights w{nullptr, outputs, inputs, dtype};
                    std::vector<uint16_t> packed(w.tiles() * w.lines() * kLineBytes / 2);
                    // Of magnitudes from 2^-7 to 2^8, whatever the last line is filled up with: x is 0 there.
                    for (auto &word : packed)
                        word = dtype == common::kBFloat16 ? 0x3c00 + (random() & 0x87ff) : 0x2000 + (random() & 0xbfff);
                    w.packed = reinterpret_cast<const uint8_t *>(packed.data());
                    std::vector<float> x(rows * inputs), bias(outputs), out(rows * outputs), expected(out.size());
                    for (auto &value : x) value = normal(random);
                    for (auto &value : bias) value = rows % 2 ? normal(random) : 0;
                    for (int64_t m = 0; m < rows; ++m)
                        for (int64_t n = 0; n < outputs; ++n) {
                            const uint16_t *tile = packed.data() + n / kTileOutputs * w.lines() * kLineBytes / 2;
                            float sum = 0;
                            for (int64_t k = 0; k < inputs; ++k) {
                                const uint16_t *line = tile + k / 2 * kLineBytes / 2;
                                const int64_t i = n % kTileOutputs;
                                const uint16_t word = dtype == common::kBFloat16 ? line[2 * i + k % 2]
                                                                                 : line[k % 2 * kTileOutputs + i];
                                sum = std::fma(number(word, dtype), x[m * inputs + k], sum);
                            }
                            expected[m * outputs + n] = sum + bias[n];
                        }
                    for (const int isa : isas)
                        for (const int threads : {1, 3}) {
                            std::fill(out.begin(), out.end(), NAN);
                            if (w16a16_linear(x.data(), packed.data(), rows % 2 ? bias.data() : nullptr, out.data(),
                                              rows, outputs, inputs, dtype, common::kFloat32, common::kFloat32, isa,
                                              threads) ||
                                std::memcmp(out.data(), expected.data(), out.size() * 4)) {
                                std::printf("isa %d: dtype %d, %ld x %ld, rows %ld differ\n", isa, dtype,
                                            long(outputs), long(inputs), long(rows));
                                return 1;
                            }
                            ++checked;
                        }
                }
    std::printf("%d results, %zu instruction sets\n", checked, isas.size());
}
