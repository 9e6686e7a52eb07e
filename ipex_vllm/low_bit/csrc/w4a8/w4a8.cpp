#include "w4a8/w4a8.h"

#include "common/buffer.h"
#include "common/parallel.h"

using namespace w4a8;

namespace {

const Kernel &kernel(Isa isa) {
    return isa == kAvx512Vnni ? kAvx512VnniKernel : isa == kAvxVnni ? kAvxVnniKernel : kAvx2Kernel;
}

} // namespace

int32_t w4a8_isa() {
    // AVX2 machines without FMA or F16C (VIA, some virtual CPU models) exist; AVX-512 ones do not.
    if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl"))
        return kAvx512Vnni;
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c"))
        return kNone;
    return __builtin_cpu_supports("avxvnni") ? kAvxVnni : kAvx2;
}

int32_t w4a8_linear(const void *x, const void *packed, const void *bias, void *out, int64_t rows, int64_t outputs,
                    int64_t inputs, int64_t group, int32_t symmetric, int32_t dtype, int32_t bias_dtype, int32_t isa,
                    int32_t threads) {
    const Kernel &k = kernel(Isa(isa));
    const Weights weights{static_cast<const uint8_t *>(packed), outputs, inputs, group, symmetric != 0};
    const Output output{out, DType(dtype), bias, DType(bias_dtype)};

    const int64_t stride = inputs + kRowPadding;
    const int64_t codes_bytes = common::round_up(rows * stride, common::kCacheLine);
    const int64_t scales_bytes = common::round_up(rows * 4, common::kCacheLine);
    const common::Buffer buffer = common::allocate(codes_bytes + scales_bytes + rows * weights.groups() * kSumsBytes);
    if (!buffer) return -1;
    const Activations activations{reinterpret_cast<int8_t *>(buffer.get()),
                                  reinterpret_cast<float *>(buffer.get() + codes_bytes),
                                  buffer.get() + codes_bytes + scales_bytes, stride, weights.groups()};

    common::prepare_and_multiply(
        rows, weights.tiles(), threads,
        [&](int64_t row) { k.quantize(x, output.dtype, weights, activations, row); },
        [&](int64_t tile, int64_t begin, int64_t end) {
            k.multiply(weights, activations, output, tile, begin, end);
        });
    return 0;
}
