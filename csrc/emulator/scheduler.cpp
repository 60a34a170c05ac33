// Runs a grid: block after block, within a block warp after warp and lane after lane, each until it has to wait.
#include <sys/mman.h>

#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <thread>

#include "internal.h"

#if PREQUANT_ASAN
#include <sanitizer/asan_interface.h>
#endif

namespace prequant::emulator {

Options options;
Hooks* hooks = nullptr;

void abandon(std::string message) {
    Block* block = current->block;
    if (block->error.empty()) {
        const uint3 b = current->block_index, t = current->thread_index;
        char place[160];
        std::snprintf(place, sizeof place, "block (%u,%u,%u) thread (%u,%u,%u): ", b.x, b.y, b.z, t.x, t.y, t.z);
        block->error = place + message;
    }
    switch_to_scheduler(true);
    __builtin_unreachable();
}

void fail(const char* format, ...) {
    char text[512];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    abandon(text);
}

// ---- whose turn it is ----

uint64_t next_random(Block* block) {  // splitmix64
    uint64_t z = (block->random_state += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

static int pick_lane(Block* block, uint32_t lanes) {
    if (options.seed != 0)
        for (auto skip = next_random(block) % __builtin_popcount(lanes); skip > 0; --skip) lanes &= lanes - 1;
    return __builtin_ctz(lanes);
}

static void open_barrier_if_full(Block* block) {
    if (block->arrived == 0 || block->arrived != block->live) return;
    block->arrived = 0;
    ++block->epoch;
    block->barrier_result = block->barrier_count;
    block->barrier_count = 0;
    for (uint32_t i = 0; i < block->warp_count; ++i) {
        Warp& warp = block->warps[i];
        warp.ready |= warp.at_barrier;
        warp.at_barrier = 0;
        if (hooks != nullptr) hooks->warp_converged(i);
    }
}

// As strict as compute-sanitizer's synccheck: the whole block, at one place of the source.
static void arrive_at_barrier(const void* site, bool predicate) {
    Block* block = current->block;
    if (block->live != block->threads) fail("__syncthreads after %u threads exited", block->threads - block->live);
    if (block->arrived != 0 && block->barrier_site != site) fail("divergent __syncthreads: two places of the source");
    block->barrier_site = site;
    block->barrier_count += predicate;
    block->warps[current->warp].at_barrier |= 1u << current->lane;
    ++block->arrived;
    open_barrier_if_full(block);
    switch_to_scheduler(false);
}

void sync_threads() { arrive_at_barrier(__builtin_return_address(0), false); }

int sync_threads_count(bool predicate) {
    arrive_at_barrier(__builtin_return_address(0), predicate);
    return current->block->barrier_result;
}

void exit_thread() {
    Block* block = current->block;
    Warp& warp = block->warps[current->warp];
    warp.live &= ~(1u << current->lane);
    --block->live;
    for (const Collective& waiting : warp.collectives)
        if (waiting.name != nullptr && (waiting.mask >> current->lane & 1))
            fail("thread exits while other lanes wait for it in %s", waiting.name);
    if (block->arrived != 0) fail("thread exits while %u threads wait at __syncthreads", block->arrived);
    switch_to_scheduler(true);
    __builtin_unreachable();
}

static std::string describe_deadlock(const Block& block) {
    std::string text = "block " + std::to_string(block.number) + ": deadlock:";
    char part[200];
    for (uint32_t i = 0; i < block.warp_count; ++i) {
        const Warp& warp = block.warps[i];
        std::snprintf(part, sizeof part, " warp %u: live %08x at __syncthreads %08x", i, warp.live, warp.at_barrier);
        text += part;
        for (const Collective& waiting : warp.collectives) {
            if (waiting.name == nullptr) continue;
            std::snprintf(part, sizeof part, ", in %s mask %08x arrived %08x", waiting.name, waiting.mask,
                          waiting.arrived);
            text += part;
        }
        text += ";";
    }
    return text;
}

static void run_block(Block* block) {
    block->scheduler_frame = __builtin_frame_address(0);
    uint32_t turn = 0;
    while (block->live > 0) {
        const uint32_t first = options.seed != 0 ? static_cast<uint32_t>(next_random(block) % block->warp_count) : turn;
        uint32_t chosen = block->warp_count;
        for (uint32_t i = 0; i < block->warp_count && chosen == block->warp_count; ++i) {
            const uint32_t candidate = (first + i) % block->warp_count;
            if (block->warps[candidate].ready != 0) chosen = candidate;
        }
        if (chosen == block->warp_count) {
            block->error = describe_deadlock(*block);
            return;
        }
        turn = (chosen + 1) % block->warp_count;
        Warp& warp = block->warps[chosen];
        while (warp.ready != 0) {
            const int lane = pick_lane(block, warp.ready);
            warp.ready &= ~(1u << lane);
            switch_to_fiber(block, &block->fibers[chosen * kWarp + lane]);
            if (!block->error.empty()) return;
            if (options.seed != 0 && next_random(block) % 8 == 0) break;  // let another warp overtake
        }
    }
}

// ---- memory of an OS thread, kept for its next grids ----

constexpr size_t kStackBytes = PREQUANT_ASAN ? 256 * 1024 : 64 * 1024;

constexpr size_t kSlack = 64 * 1024;  // a stray write into shared memory ends here instead of in somebody's memory

struct Worker {
    std::unique_ptr<Fiber[]> fibers;
    unsigned char* stacks = nullptr;
    unsigned char* shared = nullptr;
    size_t threads = 0, shared_bytes = 0;

    void reserve(size_t wanted_threads, size_t wanted_shared) {
        if (wanted_threads > threads) {
            release_stacks();
            threads = wanted_threads;
            fibers = std::make_unique<Fiber[]>(threads);
            void* memory = mmap(nullptr, threads * kStackBytes, PROT_READ | PROT_WRITE,
                                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            if (memory == MAP_FAILED)
                throw std::runtime_error("the emulator has no memory for the stacks of " + std::to_string(threads) +
                                         " threads");
            stacks = static_cast<unsigned char*>(memory);
            for (size_t i = 0; i < threads; ++i)
                fibers[i].stack = stacks + i * kStackBytes, fibers[i].stack_bytes = kStackBytes;
        }
        if (wanted_shared != shared_bytes) {  // exactly so much: an address sanitizer sees the first byte past the end
            std::free(shared);
            void* memory = nullptr;
            if (posix_memalign(&memory, 1024, wanted_shared + (PREQUANT_ASAN ? 0 : kSlack)) != 0)
                throw std::bad_alloc();
            shared = static_cast<unsigned char*>(memory), shared_bytes = wanted_shared;
            if (!PREQUANT_ASAN) std::memset(shared + shared_bytes, kUntouched, kSlack);
        }
    }
    void release_stacks() {
        if (stacks != nullptr) munmap(stacks, threads * kStackBytes);
    }
    ~Worker() {
        std::free(shared);
        release_stacks();
    }
};

static void begin_block(Block* block, dim3 grid, dim3 size, uint32_t number, size_t shared_bytes) {
    block->live = block->threads;
    block->number = number;
    block->arrived = block->epoch = 0;
    block->warps.assign(block->warp_count, Warp{});
    block->statics.clear();
    block->static_bytes = 0;
    block->random_state = options.seed + number * 7919u;
#if PREQUANT_ASAN
    __asan_unpoison_memory_region(block->shared, block->shared_bytes);
    __asan_poison_memory_region(block->shared, kStaticWindow);
#endif
    if (options.is_poisoned) std::memset(block->shared + kStaticWindow, 0xff, shared_bytes);
    for (uint32_t t = 0; t < block->threads; ++t) {
        Fiber& fiber = block->fibers[t];
        fiber.copies.clear();
        fiber.open_group = 0;
        fiber.thread = {
            .thread_index = make_uint3(t % size.x, t / size.x % size.y, t / (size.x * size.y)),
            .block_index = make_uint3(number % grid.x, number / grid.x % grid.y, number / (grid.x * grid.y)),
            .block_size = size,
            .grid_size = grid,
            .linear = t,
            .lane = t % kWarp,
            .warp = t / kWarp,
            .block = block,
            .fiber = &fiber};
        prepare_fiber(&fiber);
        block->warps[t / kWarp].live |= 1u << t % kWarp;
        block->warps[t / kWarp].ready |= 1u << t % kWarp;
    }
}

// Bytes of shared memory that a block may have: those of the GPU that PREQUANT_EMULATED_SM names (as in
// ../cuda/dispatch.h), else the least of all from sm_80 on.
static size_t shared_limit() {
    const char* sm = std::getenv("PREQUANT_EMULATED_SM");
    if (sm == nullptr || options.shared_limit != Options{}.shared_limit) return options.shared_limit;
    switch (std::atoi(sm)) {
        case 75: return 64 * 1024;
        case 80: return 163 * 1024;
        case 90:
        case 100: return 227 * 1024;
        default: return options.shared_limit;
    }
}

static void check_launch(const char* name, dim3 grid, dim3 size, size_t shared_bytes) {
    const auto refuse = [&](const std::string& reason) {
        throw std::runtime_error(std::string(name) + ": CUDA would not launch the kernel: " + reason);
    };
    const uint64_t threads = uint64_t(size.x) * size.y * size.z;
    if (threads == 0 || threads > 1024 || size.z > 64) refuse("a block of " + std::to_string(threads) + " threads");
    if (grid.x == 0 || grid.x > 0x7fffffffu || grid.y == 0 || grid.y > 65535 || grid.z == 0 || grid.z > 65535)
        refuse("a grid of " + std::to_string(grid.x) + " x " + std::to_string(grid.y) + " x " + std::to_string(grid.z) +
               " blocks");
    if (shared_bytes > shared_limit())
        refuse(std::to_string(shared_bytes) + " bytes of shared memory, a block has " + std::to_string(shared_limit()));
    if (uint64_t(grid.x) * grid.y * grid.z > 0xffffffffu) refuse("more blocks than the emulator counts");
}

void run_grid(const char* name, dim3 grid, dim3 size, size_t shared_bytes, void (*body)(void*), void* environment) {
    check_launch(name, grid, size, shared_bytes);
    const uint32_t threads = size.x * size.y * size.z, blocks = grid.x * grid.y * grid.z;
    std::vector<uint32_t> order;
    if (options.seed != 0) {
        order.resize(blocks);
        std::iota(order.begin(), order.end(), 0u);
        Block dice;
        dice.random_state = options.seed;
        for (uint32_t i = blocks; i > 1; --i) std::swap(order[i - 1], order[next_random(&dice) % i]);
    }
    if (hooks != nullptr) hooks->grid_begins(name, grid, size, shared_bytes);

    std::atomic<uint32_t> next{0};
    std::mutex error_mutex;
    std::string error;
    std::atomic<bool> has_failed{false};
    const auto work = [&] {
        static thread_local Worker worker;
        worker.reserve(threads, kStaticWindow + shared_bytes);
        Block block;
        block.fibers = worker.fibers.get();
        block.threads = threads;
        block.warp_count = (threads + kWarp - 1) / kWarp;
        block.shared = worker.shared;
        block.dynamic_offset = kStaticWindow;
        block.shared_bytes = kStaticWindow + shared_bytes;
        block.body = body;
        block.environment = environment;
        for (uint32_t i; !has_failed && (i = next++) < blocks;) {
            begin_block(&block, grid, size, options.seed != 0 ? order[i] : i, shared_bytes);
            if (hooks != nullptr) hooks->block_begins(&block);
            run_block(&block);
            check_red_zones(&block);
            if (hooks != nullptr) hooks->block_ends(&block);
            if (!block.error.empty()) {
                const std::lock_guard<std::mutex> lock(error_mutex);
                error = block.error;
                has_failed = true;
                if (!PREQUANT_ASAN) std::memset(worker.shared + worker.shared_bytes, kUntouched, kSlack);
            }
        }
    };
    const uint32_t workers = hooks != nullptr ? 1 : std::min<uint32_t>(static_cast<uint32_t>(options.workers), blocks);
    if (workers <= 1) {
        work();
    } else {
        std::vector<std::thread> pool;
        for (uint32_t i = 0; i < workers; ++i) pool.emplace_back(work);
        for (std::thread& thread : pool) thread.join();
    }
    if (has_failed) throw std::runtime_error(std::string(name) + ": the emulated kernel failed: " + error);
}

}  // namespace prequant::emulator
