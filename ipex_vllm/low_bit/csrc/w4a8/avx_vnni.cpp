// Compiled with AVX2, FMA, F16C and AVX-VNNI.
#include "w4a8/vector256.h"

namespace w4a8 {
namespace {

struct Vnni {
    using Dot = __m256i;
    static constexpr int max_rows = 3; // 6 int32 and 6 float32 accumulators, two codes, one activation: 15 of 16
    static Dot begin(__m256i total) { return total; }
    static Dot dot(Dot sum, __m256i codes, __m256i quad) { return _mm256_dpbusd_avx_epi32(sum, codes, quad); }
    static __m256i end(__m256i, Dot sum) { return sum; }
};

} // namespace

const Kernel kAvxVnniKernel{quantize<Vector256<Vnni>>, multiply<Vector256<Vnni>>};

} // namespace w4a8
