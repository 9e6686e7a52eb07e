// Compiled with AVX-512 F, BW, VL, VNNI and AMX-INT8, or without the last by a compiler that does not know it.
#include "w4a8/w4a8.h"

#ifdef __AMX_INT8__

#include "w4a8/levels512.h"

#include "common/amx_kernel.h"

namespace w4a8 {
namespace {

struct Amx : common::Int8Vectors512 {
    static constexpr int slot(int) { return 0; }

    // Lines of nibbles as lines of bytes.
    static void unpack(const uint8_t *nibbles, int lines, uint8_t *bytes) {
        const I mask = _mm512_set1_epi8(15);
        for (int i = 0; i < lines; ++i) {
            const I line = load_bytes(nibbles + i * kLineBytes);
            _mm512_store_si512(bytes + i * 2 * kLineBytes, _mm512_and_si512(line, mask));
            _mm512_store_si512(bytes + (2 * i + 1) * kLineBytes, _mm512_and_si512(_mm512_srli_epi16(line, 4), mask));
        }
    }
};

template <Table T> struct AmxLookup : Levels512<T> {
    static void unpack(const uint8_t *nibbles, int lines, uint8_t *bytes) {
        for (int i = 0; i < lines; ++i) {
            __m512i codes[2];
            AmxLookup::look_up(AmxLookup::load_bytes(nibbles + i * kLineBytes), codes);
            _mm512_store_si512(bytes + i * 2 * kLineBytes, codes[0]);
            _mm512_store_si512(bytes + (2 * i + 1) * kLineBytes, codes[1]);
        }
    }
};

void multiply_amx(const Weights &w, const Activations &a, const Output &out, int64_t tile, int64_t begin, int64_t end) {
    with_types<Amx, AmxLookup>(w, [&](auto vectors, auto layout) {
        common::multiply_tile_amx<decltype(vectors), decltype(layout)>({w.packed, w.outputs, w.groups()}, a, out, tile,
                                                                       begin, end);
    });
}

const Kernel kKernel{quantize<Amx, AmxLookup>, multiply_amx};

} // namespace

const Kernel *const kAmxKernel = &kKernel;

} // namespace w4a8

#else

const w4a8::Kernel *const w4a8::kAmxKernel = nullptr;

#endif
