// Memory for one call, given back at its end.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>

struct Free {
    void operator()(void *p) const { std::free(p); }
};
using Buffer = std::unique_ptr<char, Free>;

// Aligned to 64 bytes, as aligned_alloc wants the size to be; null when there is none.
inline Buffer allocate(int64_t bytes) { return Buffer(static_cast<char *>(std::aligned_alloc(64, (bytes + 63) / 64 * 64))); }
