// The two parallel loops of a matmul.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/types.h"

namespace common {

// prepare(row) for every row, then multiply(tile, begin, end) for every tile and all rows, at most kMaxTaskRows at a time.
template <class Prepare, class Multiply>
void prepare_and_multiply(int64_t rows, int64_t tiles, int32_t threads, const Prepare &prepare,
                          const Multiply &multiply) {
    const int64_t tasks = (rows + kMaxTaskRows - 1) / kMaxTaskRows * tiles;
    // Guided: one core of a small machine is often busy with something else. What a thread takes is contiguous, for
    // the prefetcher. A result depends neither on the thread that computed it nor on what else is in the batch.
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; ++row) prepare(row);
#pragma omp for schedule(guided) nowait
        for (int64_t task = 0; task < tasks; ++task) {
            const int64_t begin = task / tiles * kMaxTaskRows;
            multiply(task % tiles, begin, std::min(rows, begin + kMaxTaskRows));
        }
    }
}

} // namespace common
