#include "common/int8.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <cpuid.h>

namespace common {
namespace {

// AMX' registers are large, so that Linux gives them to the processes that ask (arch_prctl(2), ARCH_REQ_XCOMP_PERM).
bool may_use_amx() {
    constexpr long request_permission = 0x1023, tile_data = 18;
    unsigned eax, ebx, ecx, edx;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
    constexpr unsigned amx_tile = 1u << 24, amx_int8 = 1u << 25;
    return (edx & amx_tile) && (edx & amx_int8) && !syscall(SYS_arch_prctl, request_permission, tile_data);
}

} // namespace

bool is_intel() {
    static const bool is = __builtin_cpu_is("intel");
    return is;
}

Isa best_isa(bool with_amx) {
    // AVX2 machines without FMA or F16C (VIA, some virtual CPU models) exist; AVX-512 ones do not.
    if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl")) {
        static const bool amx = may_use_amx();
        return with_amx && amx ? kAmx : kAvx512Vnni;
    }
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c"))
        return kNone;
    return __builtin_cpu_supports("avxvnni") ? kAvxVnni : kAvx2;
}

} // namespace common
