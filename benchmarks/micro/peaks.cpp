// What two cores can do at most: read memory, and multiply int8 with vpdpbusd. Compiled by benchmarks.kernels.
#include <immintrin.h>
#include <omp.h>

#include <cstdint>

extern "C" {
// Seconds that `threads` threads need to read `bytes` bytes, each its own contiguous part.
double read_seconds(const char *data, int64_t bytes, int32_t threads) {
    const double begun = omp_get_wtime();
#pragma omp parallel num_threads(threads)
    {
        const int64_t part = bytes / threads / 256 * 256;
        const char *from = data + omp_get_thread_num() * part;
        __m512i sums[4] = {};
        for (int64_t i = 0; i < part; i += 256)
            for (int64_t j = 0; j < 4; ++j)
                sums[j] = _mm512_xor_si512(sums[j], _mm512_loadu_si512(from + i + 64 * j));
        asm volatile("" ::"v"(sums[0]), "v"(sums[1]), "v"(sums[2]), "v"(sums[3]));
    }
    return omp_get_wtime() - begun;
}

// Multiply-adds and additions, counted as two operations, per second of `threads` threads that do nothing else.
double int8_ops_per_second(int32_t threads) {
    constexpr int kSteps = 4000, kAccumulators = 24;
    const double begun = omp_get_wtime();
#pragma omp parallel num_threads(threads)
    {
        __m512i sums[kAccumulators], ones = _mm512_set1_epi8(1);
#pragma GCC unroll 24
        for (int i = 0; i < kAccumulators; ++i) sums[i] = _mm512_setzero_si512();
        for (int step = 0; step < kSteps; ++step)
#pragma GCC unroll 24
            for (int i = 0; i < kAccumulators; ++i) asm volatile("vpdpbusd %1, %1, %0" : "+v"(sums[i]) : "v"(ones));
    }
    return 2.0 * 64 * kSteps * kAccumulators * threads / (omp_get_wtime() - begun);
}
}
