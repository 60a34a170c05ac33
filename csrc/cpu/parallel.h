// Threads and scratch memory of the CPU kernels, compiled once for all levels.
//
// A kernel splits its work into fixed tasks whose results do not depend on which thread runs them, so neither do the
// kernel's.
#pragma once

#include <cstdint>

namespace prequant {

// run(begin, end, context) over ranges that cover 0 .. tasks, on torch's threads. The calling thread does it alone
// where that is one range's worth: `task_cost` is a task's cost in nanoseconds, roughly. The first exception of a range
// is rethrown here.
void parallel_ranges(int64_t tasks, int64_t task_cost, void (*run)(int64_t, int64_t, const void*), const void* context);

int64_t num_threads();

// At least `bytes` of this thread's own memory, on a cache line; the next call takes it back. Kernels ask for what
// their block constants say, below 2 MiB.
void* thread_scratch(int64_t bytes);

// Memory that a call holds while it runs, for what all its threads read. The thread keeps up to kKeptBytes of each of a
// few buffers for the next call, so that calls in a steady state allocate nothing; buffers of one thread are given back
// in the reverse order.
class Buffer {
   public:
    explicit Buffer(int64_t bytes);
    ~Buffer();
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    void* data() const { return data_; }

   private:
    void* data_;
    bool is_kept_;
};

}  // namespace prequant
