// Compiled with AVX2, FMA, F16C and AVX-VNNI.
#include "common/int8_vnni256.h"
#include "w4a8/nibbles256.h"

namespace w4a8 {

using AvxVnni = Nibbles256<common::Vnni256>;
template <Table T> using Lookup = Levels256<common::Vnni256, 128, T>;

const Kernel kAvxVnniKernel{quantize<AvxVnni, Lookup>, multiply<AvxVnni, Lookup>};

} // namespace w4a8
