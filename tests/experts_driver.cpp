// Runs a layer of experts with every instruction set this CPU has, on buffers of exactly the needed size: under
// AddressSanitizer a read or write past an end stops it. Every set, and every batch, has to give the same bits; but 8-bit
// floats times bfloat16, which one set adds in another order.
// tests/test_experts.py says whether they are the right ones.
#include "int8_driver.h"
#include "experts/experts.h"

struct Layer {
    int64_t hidden, intermediate, group;
    experts::Format format, down_format;

    Layer(int64_t hidden, int64_t intermediate, int64_t group, experts::Format format)
        : Layer(hidden, intermediate, group, format, format) {}
    Layer(int64_t hidden, int64_t intermediate, int64_t group, experts::Format format, experts::Format down_format)
        : hidden(hidden), intermediate(intermediate), group(group), format(format), down_format(down_format) {}
};

static void set_scales(std::vector<uint8_t> &bytes, size_t every, float scale) {
    const std::vector<float> scales(common::kTileOutputs, scale);
    for (size_t block = 0; block < bytes.size(); block += every)
        std::memcpy(bytes.data() + block, scales.data(), 4 * scales.size());
}

// float16 below 0.13
static void bound_halves(std::vector<uint8_t> &bytes, size_t every, int64_t terms_bytes) {
    for (size_t block = 0; block < bytes.size(); block += every)
        for (int64_t i = 1; i < terms_bytes; i += 2) bytes[block + i] &= 0xaf;
}

static void make_finite(std::vector<uint8_t> &bytes, const w4a8::Weights &w) {
    bound_halves(bytes, w.block_bytes(), w.terms_bytes());
}
static void make_finite(std::vector<uint8_t> &bytes, const w8a8::Weights &w) {
    if (w.group)
        bound_halves(bytes, w.block_bytes(), common::kTermBytes);
    else
        set_scales(bytes, w.tile_bytes(), 0.01f);
}
static void make_finite(std::vector<uint8_t> &bytes, const w8a16::Weights &w) {
    for (auto &byte : bytes) byte &= 0xbf; // numbers, and small ones
    set_scales(bytes, w.block_bytes(), 1.0f);
}

// Random codes, scales that are finite.
template <class Weights>
static std::vector<uint8_t> packed(int64_t experts, const Weights &weights, std::mt19937 &random) {
    std::vector<uint8_t> bytes(experts * weights.tiles() * experts::tile_bytes(weights));
    for (auto &byte : bytes) byte = random();
    make_finite(bytes, weights);
    return bytes;
}

static float largest(const std::vector<float> &values) {
    float result = 0;
    for (const float value : values) result = std::fmax(result, std::fabs(value));
    return result;
}

int main() {
    std::mt19937 random(0);
    std::vector<int> for_floats{w8a16::kAvx2};
    if (w8a16_isa(common::kFloat32) == w8a16::kAvx512) for_floats.push_back(w8a16::kAvx512);
    if (w8a16_isa(common::kBFloat16) == w8a16::kAvx512Bf16) for_floats.push_back(w8a16::kAvx512Bf16);
    const std::vector<int> for_integers = known_isas(w4a8_isa(1000));
    using namespace experts;
    const int64_t experts = 5, chosen = 3;
    int checked = 0;
    for (const Layer &layer :
         {Layer{64, 32, 32, kSymInt4}, Layer{160, 96, 32, kAsymInt4}, Layer{128, 192, 64, kSymInt4},
          Layer{256, 384, 128, kAsymInt4}, Layer{160, 96, 32, kFp4}, Layer{128, 192, 64, kNf4}, Layer{70, 96, 0, kInt8},
          Layer{160, 96, 32, kInt8}, Layer{128, 192, 64, kInt8}, Layer{160, 96, 32, kAsymInt4, kInt8},
          Layer{128, 192, 64, kInt8, kSymInt4}, Layer{71, 96, 0, kE4M3}, Layer{160, 96, 32, kE5M2},
          Layer{256, 384, 128, kE4M3}})
        for (const int64_t tokens : {1, 2, 40, 300})
            for (int activation = 0; activation < (layer.hidden == 64 ? 4 : 1); ++activation) { // of one layer, all
                std::vector<float> x(tokens * layer.hidden), weights(tokens * chosen), down_bias(experts * layer.hidden);
                std::vector<float> gate_up_bias(experts * 2 * layer.intermediate);
                for (auto *values : {&x, &weights, &down_bias, &gate_up_bias})
                    for (auto &value : *values) value = std::normal_distribution<float>()(random);
                std::vector<int32_t> ids(tokens * chosen);
                for (auto &id : ids) id = int(random() % (experts + 2)) - 1; // some are no expert's
                std::vector<float> first, out(tokens * layer.hidden);
                ExpertsCall call{};
                call.gate_up_format = layer.format;
                call.down_format = layer.down_format;
                call.hidden = layer.hidden;
                call.intermediate = layer.intermediate;
                call.gate_up_group = call.down_group = layer.group;
                std::vector<uint8_t> gate_up, down;
                with_weights(call, [&](const auto &gate_up_weights, const auto &down_weights) {
                    gate_up = packed(experts, gate_up_weights, random);
                    down = packed(experts, down_weights, random);
                    return 0;
                });
                call.x = x.data();
                call.gate_up = gate_up.data();
                call.down = down.data();
                call.gate_up_bias = tokens % 2 ? gate_up_bias.data() : nullptr;
                call.down_bias = tokens % 2 ? nullptr : down_bias.data();
                call.weights = weights.data();
                call.ids = ids.data();
                call.out = out.data();
                call.tokens = tokens;
                call.chosen = chosen;
                call.experts = experts;
                call.dtype = common::kFloat32;
                call.activation = activation;
                const auto differs = [&](int isa) {
                    std::printf("isa %d: %ld x %ld, group %ld, format %d, %ld tokens differ\n", isa, long(layer.hidden),
                                long(layer.intermediate), long(layer.group), layer.format, long(tokens));
                    return 1;
                };
                const bool is_floats = layer.format >= kE4M3;
                for (const int isa : is_floats ? for_floats : for_integers)
                    for (const int threads : {1, 3}) {
                        std::fill(out.begin(), out.end(), NAN);
                        call.isa = isa;
                        call.threads = threads;
                        if (experts_forward(&call)) return differs(isa);
                        for (const float value : out)
                            if (!std::isfinite(value)) return differs(isa);
                        if (first.empty()) first = out;
                        if (is_floats && isa == w8a16::kAvx512Bf16) { // rounds what goes in to bfloat16
                            for (size_t i = 0; i < out.size(); ++i)
                                if (std::fabs(out[i] - first[i]) > 0.05f * largest(first)) return differs(isa);
                            continue;
                        }
                        if (std::memcmp(out.data(), first.data(), out.size() * 4)) return differs(isa);
                        ++checked;
                    }
                call.isa = common::kNone;
                const int64_t last = tokens - 1;
                std::vector<float> alone(x.end() - layer.hidden, x.end()), result(layer.hidden, NAN);
                call.x = alone.data();
                call.weights = weights.data() + last * chosen;
                call.ids = ids.data() + last * chosen;
                call.out = result.data();
                call.tokens = 1;
                if (experts_forward(&call) || std::memcmp(result.data(), first.data() + last * layer.hidden, layer.hidden * 4))
                    return differs(0);
            }
    std::printf("%d results, %zu instruction sets\n", checked, for_integers.size());
}
