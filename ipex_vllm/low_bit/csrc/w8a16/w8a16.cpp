#include "w8a16/w8a16.h"

#include "common/buffer.h"
#include "common/parallel.h"

using namespace w8a16;

const Kernel &w8a16::kernel(int32_t isa) {
    return isa == kAvx512Bf16 ? kAvx512Bf16Kernel : isa == kAvx512 ? kAvx512Kernel : kAvx2Kernel;
}

int32_t w8a16_isa(int32_t dtype) {
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
        return dtype == common::kBFloat16 && __builtin_cpu_supports("avx512bf16") ? kAvx512Bf16 : kAvx512;
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c"))
        return kNone;
    return kAvx2;
}

int32_t w8a16_linear(const void *x, const void *packed, const void *bias, void *out, int64_t rows, int64_t outputs,
                     int64_t inputs, int64_t group, int32_t format, int32_t dtype, int32_t bias_dtype, int32_t isa, int32_t threads) {
    const Kernel &k = kernel(isa);
    const Weights weights{static_cast<const uint8_t *>(packed), outputs, inputs, group, Format(format)};
    const Output output{out, DType(dtype), bias, DType(bias_dtype)};

    const int64_t stride = common::float_row_stride(inputs);
    const common::Buffer buffer = common::allocate(rows * stride * k.value_bytes);
    if (!buffer) return -1;
    const Activations activations{buffer.get(), stride};

    common::prepare_and_multiply(
        rows, weights.tiles(), threads,
        [&](int64_t row) { k.convert(x, output.dtype, weights, activations, row); },
        [&](int64_t tile, int64_t begin, int64_t end) {
            k.multiply(weights, activations, output, tile, begin, end);
        });
    return 0;
}
