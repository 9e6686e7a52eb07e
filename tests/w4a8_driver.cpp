// Runs every kernel this CPU can run against a plain loop, on buffers of exactly the needed size: under
// AddressSanitizer a read or write past an end stops it. The results have to be the same bits.
#include "int8_driver.h"
#include "w4a8/w4a8.h"

using namespace w4a8;
using common::kTileOutputs;

// What a code of each table stands for: NF4 in 127ths, E2M1 in halves.
static const int kLevels[2][16] = {{-127, -88, -67, -50, -36, -23, -12, 0, 10, 20, 31, 43, 56, 71, 92, 127},
                                   {-12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12, 0}};

static std::vector<float> reference(const std::vector<float> &x, const Weights &w, const float *bias, int64_t rows) {
    std::vector<float> out(rows * w.outputs);
    const RoundedRows rounded(x, rows, w.inputs, w.step());
    for (int64_t m = 0; m < rows; ++m)
        for (int64_t n = 0; n < w.outputs; ++n) {
            float total = 0;
            const int lane = n % 16, high = n % kTileOutputs / 16;
            for (int64_t g = 0; g < rounded.groups; ++g) {
                const int64_t first = g * w.step();
                const uint8_t *block = w.block(n / kTileOutputs, first / w.group);
                int dot = 0, sum = 0;
                for (int64_t k = first; k < first + w.step(); ++k) {
                    const uint8_t byte = block[w.terms_bytes() + k % w.group / 4 * kLineBytes + lane * 4 + k % 4];
                    const int nibble = high ? byte >> 4 : byte & 15;
                    dot += (w.table ? kLevels[w.table - 1][nibble] : nibble) * rounded.code(m, k);
                    sum += rounded.code(m, k);
                }
                const float scale = half_at(block + 2 * (n % kTileOutputs)), x_scale = rounded.scale(m, g);
                total = std::fma(scale, x_scale * float(w.symmetric && !w.table ? dot - 8 * sum : dot), total);
                if (!w.symmetric)
                    total = std::fma(half_at(block + common::kTermBytes + 2 * (n % kTileOutputs)), x_scale * float(sum), total);
            }
            out[m * w.outputs + n] = total + (bias ? bias[n] : 0.0f);
        }
    return out;
}

int main() {
    std::mt19937 random(0);
    const std::vector<int> isas = known_isas(w4a8_isa(1000));
    int checked = 0;
    for (const int64_t group : {32, 64, 128})
        for (const int kind : {0, 1, 2, 3}) // asymmetric, symmetric, and the two tables
            for (const int64_t outputs : {1, 31, 32, 33, 80})
                for (const int64_t inputs : {group, 5 * group, int64_t(1152)})
                    for (const int64_t rows : {1, 2, 3, 6, 7, 8, 15, 17, 129}) {
                        const bool symmetric = kind > 0;
                        const Table table = Table(kind > 1 ? kind - 1 : 0);
                        Weights w{nullptr, outputs, inputs, group, symmetric, table};
                        std::vector<uint8_t> packed(w.tiles() * w.groups() * w.block_bytes());
                        for (auto &byte : packed) byte = random();
                        for (int64_t b = 0; b < w.tiles() * w.groups(); ++b)
                            for (int64_t i = 1; i < w.terms_bytes(); i += 2) // float16 below 2: finite
                                packed[b * w.block_bytes() + i] &= 0xbf;
                        w.packed = packed.data();
                        std::vector<float> x(rows * inputs), bias(outputs), out(rows * outputs);
                        for (auto &value : x) value = std::normal_distribution<float>()(random);
                        for (auto &value : bias) value = std::normal_distribution<float>()(random);
                        const float *added = rows % 2 ? bias.data() : nullptr;
                        const auto expected = reference(x, w, added, rows);
                        for (const int isa : isas)
                            for (const int threads : {1, 3}) {
                                std::fill(out.begin(), out.end(), NAN);
                                if (w4a8_linear(x.data(), packed.data(), added, out.data(), rows, outputs, inputs, group,
                                                symmetric, table, common::kFloat32, common::kFloat32, isa, threads) ||
                                    std::memcmp(out.data(), expected.data(), out.size() * 4)) {
                                    std::printf("isa %d: %ld x %ld, group %ld, kind %d, rows %ld differ\n", isa,
                                                long(outputs), long(inputs), long(group), kind, long(rows));
                                    return 1;
                                }
                                ++checked;
                            }
                    }
    std::printf("%d results, %zu instruction sets\n", checked, isas.size());
}
