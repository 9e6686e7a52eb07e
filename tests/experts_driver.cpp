// Runs a layer of experts with every instruction set this CPU has, on buffers of exactly the needed size: under
// AddressSanitizer a read or write past an end stops it. Every set, and every batch, has to give the same bits.
// tests/test_experts.py says whether they are the right ones.
#include "int8_driver.h"
#include "experts/experts.h"
#include "w4a8/w4a8.h"
#include "w8a8/w8a8.h"

struct Layer {
    int64_t hidden, intermediate, group;
    int bits;
    bool symmetric;

    int64_t bytes(int64_t outputs, int64_t inputs) const {
        const w4a8::Weights four{nullptr, outputs, inputs, group, symmetric};
        const w8a8::Weights eight{nullptr, outputs, inputs, group};
        return bits == 4 ? four.tiles() * four.groups() * four.block_bytes() : eight.tiles() * eight.tile_bytes();
    }
    int64_t block_bytes() const {
        const w4a8::Weights four{nullptr, 1, group, group, symmetric};
        const w8a8::Weights eight{nullptr, 1, 64, group};
        return bits == 4 ? four.block_bytes() : eight.block_bytes();
    }
    int64_t terms_bytes() const { return bits == 4 ? (symmetric ? 64 : 128) : 64; }
};

// Random codes, scales that are finite.
static std::vector<uint8_t> packed(const Layer &layer, int64_t experts, int64_t outputs, int64_t inputs,
                                   std::mt19937 &random) {
    std::vector<uint8_t> bytes(experts * layer.bytes(outputs, inputs));
    for (auto &byte : bytes) byte = random();
    if (layer.group) {
        for (size_t block = 0; block < bytes.size(); block += layer.block_bytes())
            for (int64_t i = 1; i < layer.terms_bytes(); i += 2) bytes[block + i] &= 0xaf; // float16 below 0.13
    } else {
        const w8a8::Weights weights{nullptr, outputs, inputs, 0};
        const std::vector<float> scales(common::kTileOutputs, 0.01f);
        for (size_t tile = 0; tile < bytes.size(); tile += weights.tile_bytes())
            std::memcpy(bytes.data() + tile, scales.data(), 4 * scales.size());
    }
    return bytes;
}

int main() {
    std::mt19937 random(0);
    const std::vector<int> isas = known_isas(w4a8_isa(1000));
    const int64_t experts = 5, chosen = 3;
    int checked = 0;
    for (const Layer &layer : {Layer{64, 32, 32, 4, true}, Layer{160, 96, 32, 4, false}, Layer{128, 192, 64, 4, true},
                               Layer{256, 384, 128, 4, false}, Layer{70, 96, 0, 8, true}, Layer{160, 96, 32, 8, true},
                               Layer{128, 192, 64, 8, true}})
        for (const int64_t tokens : {1, 2, 40, 300})
            for (int activation = 0; activation < 4; ++activation) {
                const auto gate_up = packed(layer, experts, 2 * layer.intermediate, layer.hidden, random);
                const auto down = packed(layer, experts, layer.hidden, layer.intermediate, random);
                std::vector<float> x(tokens * layer.hidden), weights(tokens * chosen), down_bias(experts * layer.hidden);
                std::vector<float> gate_up_bias(experts * 2 * layer.intermediate);
                for (auto *values : {&x, &weights, &down_bias, &gate_up_bias})
                    for (auto &value : *values) value = std::normal_distribution<float>()(random);
                std::vector<int32_t> ids(tokens * chosen);
                for (auto &id : ids) id = int(random() % (experts + 2)) - 1; // some are no expert's
                std::vector<float> first, out(tokens * layer.hidden);
                ExpertsCall call{};
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
                call.hidden = layer.hidden;
                call.intermediate = layer.intermediate;
                call.gate_up_group = call.down_group = layer.group;
                call.bits = layer.bits;
                call.symmetric = layer.symmetric;
                call.dtype = common::kFloat32;
                call.activation = activation;
                const auto differs = [&](int isa) {
                    std::printf("isa %d: %ld x %ld, group %ld, %d bits, %ld tokens differ\n", isa, long(layer.hidden),
                                long(layer.intermediate), long(layer.group), layer.bits, long(tokens));
                    return 1;
                };
                for (const int isa : isas)
                    for (const int threads : {1, 3}) {
                        std::fill(out.begin(), out.end(), NAN);
                        call.isa = isa;
                        call.threads = threads;
                        if (experts_forward(&call)) return differs(isa);
                        for (const float value : out)
                            if (!std::isfinite(value)) return differs(isa);
                        if (first.empty()) first = out;
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
    std::printf("%d results, %zu instruction sets\n", checked, isas.size());
}
