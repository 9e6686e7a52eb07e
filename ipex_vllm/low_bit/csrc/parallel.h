// The two parallel loops of a matmul.
#pragma once

#include <algorithm>
#include <cstdint>

// prepare(row) for every row, then multiply(tile, begin, end) for every tile and all rows, at most max_rows at a time.
template <class Prepare, class Multiply>
void prepare_and_multiply(int64_t rows, int64_t tiles, int64_t max_rows, int32_t threads, const Prepare &prepare,
                          const Multiply &multiply) {
    const int64_t tasks = (rows + max_rows - 1) / max_rows * tiles;
    // Guided: one core of a small machine is often busy with something else. What a thread takes is contiguous, for
    // the prefetcher. A result depends neither on the thread that computed it nor on what else is in the batch.
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; ++row) prepare(row);
#pragma omp for schedule(guided) nowait
        for (int64_t task = 0; task < tasks; ++task) {
            const int64_t begin = task / tiles * max_rows;
            multiply(task % tiles, begin, std::min(rows, begin + max_rows));
        }
    }
}
