#include "w16a16/w16a16.h"

#include "common/buffer.h"
#include "common/parallel.h"

using namespace w16a16;

int32_t w16a16_isa() {
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) return kAvx512;
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c"))
        return kNone;
    return kAvx2;
}

int32_t w16a16_linear(const void *x, const void *packed, const void *bias, void *out, int64_t rows, int64_t outputs,
                      int64_t inputs, int32_t weight_dtype, int32_t dtype, int32_t bias_dtype, int32_t isa,
                      int32_t threads) {
    const Kernel &k = isa == kAvx512 ? kAvx512Kernel : kAvx2Kernel;
    const Weights weights{static_cast<const uint8_t *>(packed), outputs, inputs, DType(weight_dtype)};
    const Output output{out, DType(dtype), bias, DType(bias_dtype)};

    const int64_t stride = common::float_row_stride(inputs);
    const common::Buffer buffer = common::allocate(rows * stride * sizeof(float));
    if (!buffer) return -1;
    const Activations activations{reinterpret_cast<float *>(buffer.get()), stride};

    common::prepare_and_multiply(
        rows, weights.tiles(), threads,
        [&](int64_t row) { k.convert(x, output.dtype, weights, activations, row); },
        [&](int64_t tile, int64_t begin, int64_t end) { k.multiply(weights, activations, output, tile, begin, end); });
    return 0;
}
