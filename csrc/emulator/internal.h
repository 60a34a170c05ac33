// The parts of the emulator, to each other: options, the state of a block, the tracer's hooks.
#pragma once

#include <string>
#include <vector>

#include "../formats.h"
#include "emulator.h"

#if defined(__SANITIZE_ADDRESS__)
#define PREQUANT_ASAN 1
#else
#define PREQUANT_ASAN 0
#endif

namespace prequant::emulator {

enum class CpAsync : int { lazy, eager, random };  // data lands in the wait, at the issue, or in either

struct Options {
    uint64_t seed = 0;  // 0: a fixed order; else lanes, warps and blocks take turns at random
    CpAsync cp_async = CpAsync::lazy;
    bool is_poisoned = true;  // shared memory starts as NaN in every block
    int workers = 1;          // OS threads that share the blocks
    // Bytes that a block may have: what sm_86, sm_89 and sm_120 allow, the least from sm_80 on.
    size_t shared_limit = 99 * 1024;
};
extern Options options;

struct AsyncCopy {
    uint32_t to;
    const void* from;
    int bytes;
    int group;
    bool has_landed;
};

struct Fiber {
    void* stack_pointer = nullptr;
    unsigned char* stack = nullptr;
    size_t stack_bytes = 0;
    void* asan_stack = nullptr;
    Thread thread{};
    std::vector<AsyncCopy> copies;
    int open_group = 0;
};

// A warp collective that some lanes have reached.
struct Collective {
    const char* name = nullptr;
    uint32_t mask = 0, arrived = 0;
    void* arguments[kWarp];
};

struct Warp {
    uint32_t live = 0, ready = 0, at_barrier = 0;
    uint32_t epoch = 0;  // counts __syncwarp, which orders memory inside the warp
    Collective collectives[4];
};

struct StaticVariable {
    const void* key;
    size_t offset, bytes;
};

struct Block {
    Fiber* fibers = nullptr;
    uint32_t threads = 0, warp_count = 0, live = 0, arrived = 0;
    uint32_t epoch = 0;  // counts __syncthreads
    uint32_t number = 0;
    const void* barrier_site = nullptr;
    int barrier_count = 0, barrier_result = 0;
    std::vector<Warp> warps;
    unsigned char* shared = nullptr;  // static variables from 0, the dynamic part from dynamic_offset
    size_t shared_bytes = 0, dynamic_offset = 0, static_bytes = 0;
    std::vector<StaticVariable> statics;
    std::string error;
    void* scheduler_stack_pointer = nullptr;
    const void* scheduler_frame = nullptr;  // kernel arguments lie above it
    void* scheduler_asan_stack = nullptr;
    const void* scheduler_stack = nullptr;
    size_t scheduler_stack_bytes = 0;
    uint64_t random_state = 0;
    void (*body)(void*) = nullptr;
    void* environment = nullptr;
};

enum class Access { load, store, atomic };

// What the emulator tells a tracer. `where` is a return address inside the kernel.
struct Hooks {
    void (*grid_begins)(const char* name, dim3 grid, dim3 block, size_t shared_bytes);
    void (*block_begins)(Block*);
    void (*block_ends)(Block*);
    void (*warp_converged)(uint32_t warp);  // every live lane is at the same place
    void (*access)(const void* where, const void* address, int bytes, Access kind);
    void (*fence)();
    void (*ldmatrix)(const void* where, const uint32_t* rows, int lanes);
    void (*copy_issued)(const void* where, uint32_t to, int bytes);
    void (*copy_landed)(uint32_t to, int bytes);
    void (*buffer_allocated)(const void* address, size_t bytes, bool is_fresh);
};

constexpr size_t kStaticWindow = 48 * 1024;  // the most that CUDA allows static variables
constexpr size_t kRedZone = 256;             // after each static variable and after the dynamic part
constexpr unsigned char kUntouched = 0xa5;
constexpr uint32_t kWholeWarp = 0xffffffffu;

[[noreturn]] void abandon(std::string message);
uint64_t next_random(Block* block);
void check_red_zones(Block* block);
void buffer_allocated(void* address, size_t bytes, bool is_fresh);  // fresh: its contents mean nothing yet
void check_shared(uint32_t offset, uint32_t bytes, const char* what);

// fibers.cpp
void prepare_fiber(Fiber* fiber);
void switch_to_fiber(Block* block, Fiber* fiber);
void switch_to_scheduler(bool is_last_time);
[[noreturn]] void exit_thread();

// Performs `operation` once, when every lane of the mask has arrived; arguments[lane] is that lane's argument.
using LaneOperation = void (*)(void** arguments, uint32_t mask);
void collective(const char* name, uint32_t mask, void* argument, LaneOperation operation);

}  // namespace prequant::emulator
