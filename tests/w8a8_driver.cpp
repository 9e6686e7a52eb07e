// Runs every int8 kernel this CPU can run against a plain loop, on buffers of exactly the needed size: under
// AddressSanitizer a read or write past an end stops it. The results have to be the same bits.
#include "int8_driver.h"
#include "w8a8/w8a8.h"

using namespace w8a8;
using common::kTileOutputs;

static std::vector<float> reference(const std::vector<float> &x, const Weights &w, const float *bias, int64_t rows) {
    std::vector<float> out(rows * w.outputs);
    const RoundedRows rounded(x, rows, w.inputs, w.step());
    for (int64_t m = 0; m < rows; ++m)
        for (int64_t n = 0; n < w.outputs; ++n) {
            float total = 0, row_scale = 1;
            const uint8_t *tile = w.packed + n / kTileOutputs * w.tile_bytes();
            if (!w.group) std::memcpy(&row_scale, tile + n % kTileOutputs * 4, 4);
            for (int64_t g = 0; g < w.blocks(); ++g) {
                const uint8_t *block = tile + w.head_bytes() + g * w.block_bytes(), *scales = block;
                if (w.group) block += common::kTermBytes;
                int dot = 0;
                for (int64_t k = g * w.step(); k < std::min(w.inputs, (g + 1) * w.step()); ++k)
                    dot += (block[k % w.step() / 4 * kLineBytes + n % kTileOutputs * 4 + k % 4] - 128) * rounded.code(m, k);
                const float part = rounded.scale(m, g) * float(dot);
                total = w.group ? std::fma(half_at(scales + 2 * (n % kTileOutputs)), part, total) : total + part;
            }
            const float added = bias ? bias[n] : 0.0f;
            out[m * w.outputs + n] = w.group ? total + added : std::fma(row_scale, total, added);
        }
    return out;
}

int main() {
    std::mt19937 random(0);
    std::normal_distribution<float> normal;
    const std::vector<int> isas = known_isas(w8a8_isa(1000));
    int checked = 0;
    for (const int64_t group : {0, 32, 64})
        for (const int64_t outputs : {1, 31, 32, 33, 80})
            for (const int64_t inputs : {group ? group : 1, group ? 5 * group : 100, group ? int64_t(1152) : 1145})
                for (const int64_t rows : {1, 2, 3, 6, 7, 8, 15, 17, 129}) {
                    Weights w{nullptr, outputs, inputs, group};
                    std::vector<uint8_t> packed(w.tiles() * w.tile_bytes());
                    for (auto &byte : packed) byte = random();
                    for (int64_t t = 0; t < w.tiles(); ++t) {
                        uint8_t *tile = packed.data() + t * w.tile_bytes();
                        for (int64_t b = 0; group && b < w.blocks(); ++b)
                            for (int i = 1; i < common::kTermBytes; i += 2) // float16 below 2: finite
                                tile[b * w.block_bytes() + i] &= 0xbf;
                        for (int n = 0; !group && n < kTileOutputs; ++n) {
                            const float scale = std::fabs(normal(random));
                            std::memcpy(tile + 4 * n, &scale, 4);
                        }
                    }
                    w.packed = packed.data();
                    std::vector<float> x(rows * inputs), bias(outputs), out(rows * outputs);
                    for (auto &value : x) value = normal(random);
                    for (auto &value : bias) value = normal(random);
                    const float *added = rows % 2 ? bias.data() : nullptr;
                    const auto expected = reference(x, w, added, rows);
                    for (const int isa : isas)
                        for (const int threads : {1, 3}) {
                            std::fill(out.begin(), out.end(), NAN);
                            if (w8a8_linear(x.data(), packed.data(), added, out.data(), rows, outputs, inputs, group,
                                            common::kFloat32, common::kFloat32, isa, threads) ||
                                std::memcmp(out.data(), expected.data(), out.size() * 4)) {
                                std::printf("isa %d: %ld x %ld, group %ld, rows %ld differ\n", isa, long(outputs),
                                            long(inputs), long(group), long(rows));
                                return 1;
                            }
                            ++checked;
                        }
                }
    std::printf("%d results, %zu instruction sets\n", checked, isas.size());
}
