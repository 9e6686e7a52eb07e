// Rounds groups of weights with every instruction set this CPU has against a plain loop, on buffers of exactly the needed
// size: under AddressSanitizer a read or write past an end stops it. Codes and scales have to be the same bits, on one
// thread and on three. That they are PyTorch's is held by tests/test_low_bit_rounding.py.
#include "rounding/rounding.h"

#include <immintrin.h>

#include <cfloat>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <random>
#include <vector>

static float sum(std::vector<float> values) {
    values.resize((values.size() + 15) / 16 * 16);
    for (size_t n = values.size() / 16; n > 1; n = (n + 1) / 2)
        for (size_t i = (n + 1) / 2 * 16; i < n * 16; ++i) values[i - (n + 1) / 2 * 16] += values[i];
    for (size_t n = 8; n > 0; n /= 2)
        for (size_t i = 0; i < n; ++i) values[i] += values[i + n];
    return values[0];
}

__attribute__((target("f16c"))) static float half(float value, uint16_t &bits) {
    bits = _cvtss_sh(value, 0);
    return _cvtsh_ss(bits);
}

static float inverse(float scale) { return std::fabs(scale) < FLT_MIN ? 0 : 1 / scale; }

struct Expected {
    std::vector<uint8_t> codes, scales;
    std::vector<uint16_t> mins;
};

static Expected reference(const RoundingCall &c) {
    Expected e{std::vector<uint8_t>(c.rows * c.groups * c.size), std::vector<uint8_t>(c.rows * c.groups * (c.bits == 8 ? 4 : 2)),
               std::vector<uint16_t>(c.mins ? c.rows * c.groups : 0)};
    const float zero = c.mins ? 0 : float(1 << (c.bits - 1)), highest = float((1 << c.bits) - 1);
    const auto code = [&](float value, float inverse) {
        if (c.bits == 8) return std::fmin(std::fmax(std::nearbyint(value * inverse), -128.0f), 127.0f);
        return std::fmin(std::fmax(std::floor(value * inverse + (zero + 0.5f)), 0.0f), highest);
    };
    for (int64_t g = 0; g < c.rows * c.groups; ++g) {
        const float *x = c.values + g * c.size;
        const float *importance = c.importance ? c.importance + g % c.groups * c.size : nullptr;
        std::vector<float> squares(x, x + c.size), weights(c.size), weighted(c.size);
        for (float &value : squares) value *= value;
        const float rms = std::sqrt(sum(squares) / float(c.size));
        float low = x[0], high = x[0], extreme = x[0];
        for (int64_t i = 0; i < c.size; ++i) {
            weights[i] = importance ? importance[i] : rms + std::fabs(x[i]);
            weighted[i] = x[i] * weights[i];
            low = std::fmin(low, x[i]);
            high = std::fmax(high, x[i]);
            if (std::fabs(x[i]) > std::fabs(extreme)) extreme = x[i];
        }
        const float count = std::fmax(sum(weights), 1e-30f), total = sum(weighted);
        const float first = extreme / -float(1 << (c.bits - 1));
        float scale = c.mins ? (high - low) / highest : first / c.tried[0], min = c.mins ? low : 0, most = -1;
        for (int64_t t = 0; t < c.candidates; ++t) {
            const float step = c.mins ? (high - low) * c.tried[t] : first / c.tried[t];
            const float start = c.mins ? (high + low) / 2 - step * (highest / 2) : 0;
            std::vector<float> dots(c.size), squares(c.size), heavy(c.size);
            for (int64_t i = 0; i < c.size; ++i) {
                const float number = code(x[i] - start, inverse(step)) - (c.bits == 8 ? 0 : zero);
                dots[i] = number * weighted[i];
                heavy[i] = number * weights[i];
                squares[i] = number * heavy[i];
            }
            const float dot = sum(dots), square = sum(squares), codes_total = sum(heavy);
            float gain, best, intercept = 0;
            if (c.mins) {
                best = (count * dot - codes_total * total) / std::fmax(count * square - codes_total * codes_total, 1e-30f);
                intercept = (total - best * codes_total) / count;
                gain = best * dot + intercept * total;
            } else {
                best = dot / std::fmax(square, 1e-30f);
                gain = dot * best;
            }
            if (gain > most) {
                most = gain;
                scale = best;
                min = intercept;
            }
        }
        if (c.mins) min = half(min, e.mins[g]);
        uint16_t bits;
        if (c.bits == 8) {
            std::memcpy(&e.scales[g * 4], &scale, 4);
        } else {
            scale = half(scale, bits);
            std::memcpy(&e.scales[g * 2], &bits, 2);
        }
        for (int64_t i = 0; i < c.size; ++i) e.codes[g * c.size + i] = uint8_t(int(code(x[i] - min, inverse(scale))));
    }
    return e;
}

// The same bits, but for the sign of a zero: padding may add one of either.
static void drop_negative_zeros(uint8_t *floats, int64_t count, int bytes) {
    for (int64_t i = 0; i < count; ++i) {
        uint8_t *value = floats + i * bytes, others = value[bytes - 1] & 127;
        for (int byte = 0; byte < bytes - 1; ++byte) others |= value[byte];
        if (!others) value[bytes - 1] = 0;
    }
}

int main() {
    std::mt19937 random(0);
    std::normal_distribution<float> normal;
    std::vector<int> isas{rounding::kAvx2};
    if (rounding_isa() == rounding::kAvx512) isas.push_back(rounding::kAvx512);
    const float stretches[] = {9.5f / 8, 8.75f / 8, 1.0f, 7.25f / 8}, shrinks[] = {1.0f / 15, 0.93f / 15, 0.86f / 15};
    const struct { int bits; bool symmetric; } formats[] = {{4, true}, {5, true}, {8, true}, {4, false}, {5, false}};
    int checked = 0;
    for (const auto format : formats)
        for (const int64_t size : {1, 7, 16, 17, 32, 64, 100, 128, 2055})
            for (const bool is_weighed : {false, true})
                for (const float spread : {1.0f, 0.0f, 1e-38f}) {
                    RoundingCall c{};
                    c.rows = size < 100 ? 130 : 3, c.groups = 3, c.size = size, c.bits = format.bits;
                    std::vector<float> values(c.rows * c.groups * size), importance(c.groups * size);
                    for (auto &value : values) value = normal(random) * spread;
                    for (auto &value : importance) value = std::exp(2 * normal(random));
                    const std::vector<float> tried =
                        format.symmetric ? std::vector<float>(stretches, stretches + 4) : std::vector<float>(shrinks, shrinks + 3);
                    std::vector<uint8_t> codes(values.size()), scales(c.rows * c.groups * (format.bits == 8 ? 4 : 2));
                    std::vector<uint16_t> mins(format.symmetric ? 0 : c.rows * c.groups);
                    c.values = values.data(), c.importance = is_weighed ? importance.data() : nullptr;
                    c.tried = tried.data(), c.candidates = int64_t(tried.size());
                    c.codes = codes.data(), c.scales = scales.data(), c.mins = format.symmetric ? nullptr : mins.data();
                    Expected expected = reference(c);
                    const auto drop_zeros = [&](std::vector<uint8_t> &scales, std::vector<uint16_t> &mins) {
                        const int bytes = format.bits == 8 ? 4 : 2;
                        drop_negative_zeros(scales.data(), int64_t(scales.size()) / bytes, bytes);
                        drop_negative_zeros(reinterpret_cast<uint8_t *>(mins.data()), int64_t(mins.size()), 2);
                    };
                    drop_zeros(expected.scales, expected.mins);
                    for (const int isa : isas)
                        for (const int threads : {1, 3}) {
                            c.isa = isa, c.threads = threads;
                            std::fill(codes.begin(), codes.end(), 77);
                            const bool failed = rounding_round(&c);
                            drop_zeros(scales, mins);
                            if (failed || codes != expected.codes || scales != expected.scales || mins != expected.mins) {
                                std::printf("isa %d: %d bits, symmetric %d, groups of %ld, weighed %d, spread %g differ\n", isa,
                                            format.bits, format.symmetric, long(size), is_weighed, spread);
                                return 1;
                            }
                            ++checked;
                        }
                }
    std::printf("%d results, %zu instruction sets\n", checked, isas.size());
}
