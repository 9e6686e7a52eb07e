#include "w4a8/w4a8.h"

#include "common/int8_call.h"

using namespace w4a8;

const Kernel &w4a8::kernel(int32_t isa) {
    return isa == common::kAmx          ? *kAmxKernel
           : isa == common::kAvx512Vnni ? kAvx512VnniKernel
           : isa == common::kAvxVnni    ? kAvxVnniKernel
                                        : kAvx2Kernel;
}

int32_t w4a8_isa(int64_t rows) { return common::best_isa(kAmxKernel && rows >= kFewestAmxRows); }

int32_t w4a8_linear(const void *x, const void *packed, const void *bias, void *out, int64_t rows, int64_t outputs,
                    int64_t inputs, int64_t group, int32_t symmetric, int32_t table, int32_t dtype, int32_t bias_dtype,
                    int32_t isa, int32_t threads) {
    const Weights weights{static_cast<const uint8_t *>(packed), outputs, inputs, group, symmetric != 0, Table(table)};
    const Output output{out, DType(dtype), bias, DType(bias_dtype)};
    return common::multiply_rows(kernel(isa), weights, x, output, rows, threads);
}
