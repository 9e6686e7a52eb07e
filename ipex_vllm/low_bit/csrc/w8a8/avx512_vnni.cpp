// Compiled with AVX-512 F, BW, VL and VNNI.
#include "common/int8_vectors512.h"
#include "w8a8/kernel.h"

namespace w8a8 {
namespace {

struct Avx512Vnni : common::Int8Vectors512 {
    static constexpr int weight_of_zero = 128;
    static constexpr int slot(int) { return 0; }

    static void load_codes(const uint8_t *line, int, I (&codes)[2]) {
        codes[0] = load_bytes(line);
        codes[1] = load_bytes(line + kLineBytes / 2);
    }
};

} // namespace

const Kernel kAvx512VnniKernel{quantize<Avx512Vnni>, multiply<Avx512Vnni>};

} // namespace w8a8
