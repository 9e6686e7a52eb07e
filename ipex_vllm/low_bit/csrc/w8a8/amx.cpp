// Compiled with AVX-512 F, BW, VL, VNNI and AMX-INT8, or without the last by a compiler that does not know it.
#include "w8a8/w8a8.h"

#ifdef __AMX_INT8__

#include "common/int8_vectors512.h"

#include "common/amx_kernel.h"
#include "w8a8/kernel.h"

namespace w8a8 {
namespace {

struct Amx : common::Int8Vectors512 {
    static constexpr int weight_of_zero = 128;
    static constexpr int slot(int) { return 0; }
};

void multiply_amx(const Weights &w, const Activations &a, const Output &out, int64_t tile, int64_t begin, int64_t end) {
    with_layout(w, [&](auto layout) {
        common::multiply_tile_amx<Amx, decltype(layout)>({w.packed, w.outputs, w.blocks()}, a, out, tile, begin, end);
    });
}

const Kernel kKernel{quantize<Amx>, multiply_amx};

} // namespace

const Kernel *const kAmxKernel = &kKernel;

} // namespace w8a8

#else

const w8a8::Kernel *const w8a8::kAmxKernel = nullptr;

#endif
