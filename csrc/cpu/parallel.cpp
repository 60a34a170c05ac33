#include "parallel.h"

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <exception>
#include <new>

namespace prequant {

namespace {

constexpr int64_t kCacheLine = 64;
constexpr int64_t kRangeCost = 20000;  // nanoseconds: several times what it costs to wake and join torch's threads

void* allocate(int64_t bytes) { return ::operator new(static_cast<size_t>(bytes), std::align_val_t{kCacheLine}); }

void release(void* data) { ::operator delete(data, std::align_val_t{kCacheLine}); }

struct Arena {
    void* data = nullptr;
    int64_t size = 0;
    ~Arena() { release(data); }
};

}  // namespace

void parallel_ranges(int64_t tasks, int64_t task_cost, void (*run)(int64_t, int64_t, const void*), const void* context) {
    if (tasks <= 0) return;
    task_cost = task_cost > 0 ? task_cost : 1;
    const int64_t grain = (kRangeCost + task_cost - 1) / task_cost;
    if (tasks <= grain) return run(0, tasks, context);
    std::exception_ptr failure;
    std::atomic_flag has_failed = ATOMIC_FLAG_INIT;
    torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
        try {
            run(begin, end, context);
        } catch (...) {  // an exception must not leave a thread of the pool
            if (!has_failed.test_and_set()) failure = std::current_exception();
        }
    });
    if (failure) std::rethrow_exception(failure);
}

int64_t num_threads() { return torch::stable::get_num_threads(); }

void* thread_scratch(int64_t bytes) {
    thread_local Arena arena;
    if (arena.size < bytes) {
        release(arena.data);
        arena.data = nullptr;
        arena.size = 0;
        arena.data = allocate(bytes);
        arena.size = bytes;
    }
    return arena.data;
}

Buffer::Buffer(int64_t bytes) : data_(allocate(bytes)) {}

Buffer::~Buffer() { release(data_); }

}  // namespace prequant
