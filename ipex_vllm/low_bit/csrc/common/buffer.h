// Memory for one call, given back at its end.
#pragma once

#include <cstdlib>
#include <memory>

#include "common/types.h"

namespace common {

struct Free {
    void operator()(void *p) const { std::free(p); }
};
using Buffer = std::unique_ptr<char, Free>;

// On a cache line of its own, whole lines, as aligned_alloc wants it; null when there is no memory.
inline Buffer allocate(int64_t bytes) {
    return Buffer(static_cast<char *>(std::aligned_alloc(kCacheLine, round_up(bytes, kCacheLine))));
}

} // namespace common
