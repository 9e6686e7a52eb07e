#include "rounding/rounding.h"

#include <omp.h>

#include <algorithm>

#include "common/buffer.h"

namespace {

constexpr int64_t kTaskValues = 1 << 12; // what a thread takes at once, unless one group has more

} // namespace

int32_t rounding_isa() {
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) return rounding::kAvx512;
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c"))
        return rounding::kNone;
    return rounding::kAvx2;
}

int32_t rounding_round(const RoundingCall *call) {
    const rounding::Round round = call->isa == rounding::kAvx512 ? rounding::round_avx512 : rounding::round_avx2;
    const int64_t scratch = rounding::kArrays * common::round_up(call->size, rounding::kBlock);
    const common::Buffer buffer = common::allocate(call->threads * scratch * 4);
    if (!buffer) return -1;
    const int64_t groups = call->rows * call->groups;
    const int64_t step = std::max<int64_t>(1, kTaskValues / call->size), tasks = (groups + step - 1) / step;
#pragma omp parallel num_threads(call->threads)
    {
        float *own = reinterpret_cast<float *>(buffer.get()) + omp_get_thread_num() * scratch;
#pragma omp for schedule(guided) nowait
        for (int64_t task = 0; task < tasks; ++task)
            round(*call, task * step, std::min(groups, (task + 1) * step), own);
    }
    return 0;
}
