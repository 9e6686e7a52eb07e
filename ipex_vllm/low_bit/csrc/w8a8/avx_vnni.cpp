// Compiled with AVX2, FMA, F16C and AVX-VNNI.
#include "common/int8_vnni256.h"
#include "w8a8/kernel.h"

namespace w8a8 {
namespace {

struct AvxVnni : common::Int8Vectors256<common::Vnni256> {
    static constexpr int weight_of_zero = 128;
    static constexpr int slot(int) { return 0; }

    static void load_codes(const uint8_t *line, int slice, I (&codes)[2]) {
        codes[0] = load_bytes(line + slice * bytes);
        codes[1] = load_bytes(line + kLineBytes / 2 + slice * bytes);
    }
};

} // namespace

const Kernel kAvxVnniKernel{quantize<AvxVnni>, multiply<AvxVnni>};

} // namespace w8a8
