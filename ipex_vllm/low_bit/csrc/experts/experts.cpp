#include "experts/experts.h"

#include <algorithm>
#include <numeric>
#include <type_traits>
#include <vector>

#include "common/buffer.h"
#include "common/int8.h"
#include "w4a8/w4a8.h"
#include "w8a16/w8a16.h"
#include "w8a8/w8a8.h"

using namespace common;

namespace {

constexpr int64_t kMaxTokens = 1024; // of a pass: what lies between the steps stays below some tens of MiB

using experts::tile_bytes;

// What the three matmuls call by different names.
int32_t best_isa_for(const w4a8::Weights &, int64_t rows, DType) { return w4a8_isa(rows); }
int32_t best_isa_for(const w8a8::Weights &, int64_t rows, DType) { return w8a8_isa(rows); }
int32_t best_isa_for(const w8a16::Weights &, int64_t, DType dtype) { return w8a16_isa(dtype); }
const w4a8::Kernel &kernel_of(const w4a8::Weights &, int32_t isa) { return w4a8::kernel(isa); }
const w8a8::Kernel &kernel_of(const w8a8::Weights &, int32_t isa) { return w8a8::kernel(isa); }
const w8a16::Kernel &kernel_of(const w8a16::Weights &, int32_t isa) { return w8a16::kernel(isa); }

// Rows rounded to int8, and the memory that they are in.
template <class Weights> struct Rows {
    using Kernel = std::decay_t<decltype(kernel_of(std::declval<Weights>(), 0))>;
    static constexpr int32_t fewest_512 = kAvx512Vnni; // the first instruction set with vectors of 512 bits

    Activations all{};
    Buffer memory;

    // How many values of what goes into `w` are rounded at a time, with a scale of their own.
    static int64_t step_of(const Weights &w) { return w.step(); }
    static auto prepare(const Kernel &kernel) { return kernel.quantize; }

    bool allocate(int64_t rows, const Weights &w, const Kernel &) {
        const int64_t inputs = w.inputs, step = w.step();
        const int64_t groups = (inputs + step - 1) / step;
        const int64_t stride = round_up(groups * step, kCacheLine) + kRowPadding;
        const int64_t codes = round_up((rows + kAmxRows - 1) * stride, kCacheLine);
        memory = common::allocate(codes + rows * groups * int64_t(sizeof(GroupTerms)));
        if (!memory) return false;
        all = {reinterpret_cast<int8_t *>(memory.get()), reinterpret_cast<GroupTerms *>(memory.get() + codes), stride,
               groups};
        return true;
    }
    Activations from(int64_t row) const {
        return {all.codes + row * all.stride, all.terms + row * all.groups, all.stride, all.groups};
    }
    // One step's values of one row, as a row of its own.
    Activations part(int64_t row, int64_t g, int64_t step) const {
        return {all.codes + row * all.stride + g * step, all.terms + row * all.groups + g, all.stride, 1};
    }
    void copy(int64_t row, const Rows &to, int64_t place) const {
        std::copy_n(all.codes + row * all.stride, all.stride - kRowPadding, to.all.codes + place * all.stride);
        std::copy_n(all.terms + row * all.groups, all.groups, to.all.terms + place * all.groups);
    }
};

// Rows of floats, as w8a16 multiplies them.
template <> struct Rows<w8a16::Weights> {
    using Kernel = w8a16::Kernel;
    static constexpr int32_t fewest_512 = w8a16::kAvx512;

    w8a16::Activations all{};
    Buffer memory;
    int64_t value_bytes = 0;

    static int64_t step_of(const w8a16::Weights &) { return kTileOutputs; } // any number of tiles
    static auto prepare(const Kernel &kernel) { return kernel.convert; }

    bool allocate(int64_t rows, const w8a16::Weights &w, const Kernel &kernel) {
        value_bytes = kernel.value_bytes;
        const int64_t stride = common::float_row_stride(w.inputs);
        memory = common::allocate(rows * stride * value_bytes);
        all = {memory.get(), stride};
        return memory != nullptr;
    }
    w8a16::Activations from(int64_t row) const { return part(row, 0, 0); }
    w8a16::Activations part(int64_t row, int64_t g, int64_t step) const {
        return {all.values + (row * all.stride + g * step) * value_bytes, all.stride};
    }
    void copy(int64_t row, const Rows &to, int64_t place) const {
        const int64_t bytes = all.stride * value_bytes;
        std::copy_n(all.values + row * bytes, bytes - common::kFloatRowPadding * value_bytes, to.all.values + place * bytes);
    }
};

// Rows [begin, end) of the sorted pairs: tokens of one expert, few enough for a task.
struct Part {
    int64_t expert, begin, end;
};

// The pairs of a token and an expert that was chosen for it, sorted by expert: those of an expert in the tokens' order.
struct Sorted {
    std::vector<int64_t> place; // [tokens * chosen]: where each pair is in that order, -1 for one without an expert
    std::vector<int64_t> token; // of each place
    std::vector<Part> parts;    // of the experts that have any
    bool has_several = false;   // whether any expert has more than one row

    Sorted(const int32_t *ids, int64_t tokens, int64_t chosen, int64_t experts) : place(tokens * chosen, -1) {
        std::vector<int64_t> next(experts + 1, 0);
        const auto exists = [&](int64_t pair) { return ids[pair] >= 0 && ids[pair] < experts; };
        for (int64_t pair = 0; pair < tokens * chosen; ++pair)
            if (exists(pair)) ++next[ids[pair] + 1];
        std::partial_sum(next.begin(), next.end(), next.begin());
        token.resize(next[experts]);
        for (int64_t e = 0; e < experts; ++e) {
            has_several = has_several || next[e + 1] - next[e] > 1;
            for (int64_t row = next[e]; row < next[e + 1]; row += kMaxTaskRows)
                parts.push_back({e, row, std::min(next[e + 1], row + kMaxTaskRows)});
        }
        for (int64_t pair = 0; pair < tokens * chosen; ++pair)
            if (exists(pair)) token[place[pair] = next[ids[pair]]++] = pair / chosen;
    }
};

template <class GateUp, class Down>
int32_t forward(const ExpertsCall &call, const GateUp &gate_up, const Down &down) {
    const DType dtype = DType(call.dtype);
    const int64_t tokens = call.tokens, chosen = call.chosen, hidden = call.hidden, intermediate = call.intermediate;
    const Sorted sorted(call.ids, tokens, chosen, call.experts);
    const int64_t pairs = sorted.token.size(), parts = sorted.parts.size();

    const int32_t least = call.isa ? call.isa : best_isa_for(gate_up, 1, dtype);
    const auto kernel = [&](const auto &weights, int64_t rows) -> const auto & {
        return kernel_of(weights, call.isa ? call.isa : best_isa_for(weights, rows, dtype));
    };
    const auto &few = kernel_of(gate_up, least);
    const auto &few_down = kernel_of(down, least);
    const auto prepare = Rows<GateUp>::prepare(few);
    const auto prepare_down = Rows<Down>::prepare(few_down);
    const bool has_512 = least >= Rows<GateUp>::fewest_512;
    const experts::Vectors &vectors = has_512 ? experts::kAvx512Vectors : experts::kAvx2Vectors;

    Rows<GateUp> inputs, gathered;
    Rows<Down> between;
    const Buffer results = allocate(std::max<int64_t>(1, pairs) * hidden * 4);
    if (!results || !inputs.allocate(tokens, gate_up, few) ||
        (sorted.has_several && !gathered.allocate(pairs, gate_up, few)) ||
        !between.allocate(std::max<int64_t>(1, pairs), down, few_down))
        return -1;
    float *const result = reinterpret_cast<float *>(results.get());

    // A task computes so many outputs of the gate and as many of up as share a scale when they are rounded for down.
    const int64_t step = Rows<Down>::step_of(down), tiles_per_task = step / kTileOutputs;
    const int64_t tiles = intermediate / kTileOutputs, tasks = (tiles + tiles_per_task - 1) / tiles_per_task;
    const int64_t gate_up_bytes = gate_up.tiles() * tile_bytes(gate_up), down_bytes = down.tiles() * tile_bytes(down);

    const auto gate_up_task = [&](const Part &part, int64_t task) {
        alignas(64) float gate[kMaxTaskRows * kLargestStep], up[kMaxTaskRows * kLargestStep];
        const int64_t first = task * tiles_per_task, count = std::min(tiles_per_task, tiles - first);
        const int64_t rows = part.end - part.begin, width = count * kTileOutputs;
        const auto x = rows == 1 ? inputs.from(sorted.token[part.begin]) : gathered.from(part.begin);
        for (int64_t i = 0; i < 2 * count; ++i) {
            const int64_t tile = 2 * first + i;
            GateUp one = gate_up;
            one.packed = call.gate_up + part.expert * gate_up_bytes + tile * tile_bytes(gate_up);
            one.outputs = kTileOutputs;
            const float *bias = nullptr;
            if (call.gate_up_bias) bias = call.gate_up_bias + part.expert * 2 * intermediate + tile * kTileOutputs;
            float *to = (i % 2 ? up : gate) + i / 2 * rows * kTileOutputs;
            kernel(gate_up, rows).multiply(one, x, {to, kFloat32, bias, kFloat32}, 0, 0, rows);
        }
        vectors.activate(gate, up, rows * width, experts::Activation(call.activation));
        Down group = down;
        group.inputs = width;
        for (int64_t row = 0; row < rows; ++row) {
            float *values = gate + row * kTileOutputs;
            if (count > 1) { // the row's tiles, side by side
                values = up;
                for (int64_t i = 0; i < count; ++i)
                    std::copy_n(gate + (i * rows + row) * kTileOutputs, kTileOutputs, values + i * kTileOutputs);
            }
            prepare_down(values, kFloat32, group, between.part(part.begin + row, task, step), 0);
        }
    };
    const auto down_task = [&](const Part &part, int64_t tile) {
        Down expert = down;
        expert.packed = call.down + part.expert * down_bytes;
        const float *bias = call.down_bias ? call.down_bias + part.expert * hidden : nullptr;
        const Output output{result + part.begin * hidden, kFloat32, bias, kFloat32};
        const int64_t rows = part.end - part.begin;
        kernel(down, rows).multiply(expert, between.from(part.begin), output, tile, 0, rows);
    };
    const auto combine_token = [&](int64_t token) {
        const float *rows[64];
        for (int64_t j = 0; j < chosen; ++j) {
            const int64_t place = sorted.place[token * chosen + j];
            rows[j] = place < 0 ? nullptr : result + place * hidden;
        }
        char *out = static_cast<char *>(call.out) + token * hidden * element_bytes(dtype);
        vectors.combine(rows, call.weights + token * chosen, chosen, hidden, out, dtype);
    };

    // Guided, as in common/parallel.h. A result depends neither on the thread that computed it nor on the batch.
#pragma omp parallel num_threads(call.threads)
    {
#pragma omp for schedule(static)
        for (int64_t token = 0; token < tokens; ++token) prepare(call.x, dtype, gate_up, inputs.all, token);
        if (sorted.has_several) {
#pragma omp for schedule(static)
            for (int64_t place = 0; place < pairs; ++place) inputs.copy(sorted.token[place], gathered, place);
        }
#pragma omp for schedule(guided)
        for (int64_t i = 0; i < parts * tasks; ++i) gate_up_task(sorted.parts[i / tasks], i % tasks);
#pragma omp for schedule(guided)
        for (int64_t i = 0; i < parts * down.tiles(); ++i)
            down_task(sorted.parts[i / down.tiles()], i % down.tiles());
#pragma omp for schedule(static) nowait
        for (int64_t token = 0; token < tokens; ++token) combine_token(token);
    }
    return 0;
}

} // namespace

int32_t experts_forward(const ExpertsCall *whole) {
    const int64_t row_bytes = whole->hidden * element_bytes(DType(whole->dtype));
    for (int64_t token = 0; token < whole->tokens; token += kMaxTokens) {
        ExpertsCall call = *whole;
        call.tokens = std::min(kMaxTokens, whole->tokens - token);
        call.x = static_cast<const char *>(whole->x) + token * row_bytes;
        call.out = static_cast<char *>(whole->out) + token * row_bytes;
        call.weights += token * call.chosen;
        call.ids += token * call.chosen;
        const int32_t status = experts::with_weights(
            call, [&](const auto &gate_up, const auto &down) { return forward(call, gate_up, down); });
        if (status) return status;
    }
    return 0;
}
