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
    void grow(int64_t bytes) {
        if (size >= bytes) return;
        release(data);
        data = nullptr;
        size = 0;
        data = allocate(bytes);
        size = bytes;
    }
};

}  // namespace

void parallel_ranges(int64_t tasks, int64_t task_cost, void (*run)(int64_t, int64_t, const void*),
                     const void* context) {
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
    arena.grow(bytes);
    return arena.data;
}

constexpr int kKeptBuffers = 8;
constexpr int64_t kKeptBytes = int64_t{4} << 20;

struct KeptBuffers {
    Arena arenas[kKeptBuffers];
    int used = 0;
};

static KeptBuffers& kept_buffers() {
    thread_local KeptBuffers buffers;
    return buffers;
}

Buffer::Buffer(int64_t bytes) : is_kept_(bytes <= kKeptBytes && kept_buffers().used < kKeptBuffers) {
    if (is_kept_) {
        Arena& arena = kept_buffers().arenas[kept_buffers().used];
        arena.grow(bytes);
        data_ = arena.data;
        ++kept_buffers().used;
    } else {
        data_ = allocate(bytes);
    }
}

Buffer::~Buffer() {
    if (is_kept_)
        --kept_buffers().used;
    else
        release(data_);
}

}  // namespace prequant
