// Runs csrc/cuda/*.cu on the CPU, compiled by g++: what a kernel sees of the GPU. For tests only, never in a wheel.
//
// A block's threads are fibers of one OS thread. A fiber runs until it meets a barrier or a warp collective; the
// collective takes place once, when its last lane arrives. Wrong masks, exited lanes, divergent barriers, misaligned
// accesses and deadlocks stop the grid with a message that names block and thread. Types come from CUDA's own headers;
// nothing of its runtime is linked.
//
// Not emulated: clusters, cooperative grids, wgmma, TMA. The order of the sums inside an mma is ours; the hardware
// specifies none.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#define PREQUANT_ALWAYS_INLINE __attribute__((always_inline)) inline

namespace prequant::emulator {

struct Block;
struct Fiber;

// What a running CUDA thread can see of itself.
struct Thread {
    uint3 thread_index, block_index;
    dim3 block_size, grid_size;
    uint32_t linear, lane, warp;
    Block* block;
    Fiber* fiber;
};
// initial-exec: one load instead of a call for every threadIdx.
extern __thread __attribute__((tls_model("initial-exec"))) Thread* current;  // null outside kernels

// Runs body(environment) once for every thread of the grid. Throws std::runtime_error with the reason where a thread
// fails.
void run_grid(const char* name, dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*), void* environment);

template <typename Body>
void launch(const char* name, dim3 grid, dim3 block, size_t shared_bytes, Body body) {
    run_grid(name, grid, block, shared_bytes, [](void* environment) { (*static_cast<Body*>(environment))(); }, &body);
}

// Stops the grid with a message; the calling thread never goes on.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// ---- shared memory: one window of a block, static variables first, then the dynamic part ----

void* dynamic_shared();
void* static_shared(const void* key, size_t bytes, size_t alignment);
uint32_t shared_offset(const void* address);

// ---- memory accesses that must be seen whole: kernels make them through load and store of portable.cuh ----

struct Hooks;
extern Hooks* hooks;  // null unless a tracer listens

void check_alignment(const void* address, size_t bytes);

// Behind a call that no instrumentation sees: an access counts once, with the width that the kernel asked for.
template <typename T>
__attribute__((noinline, no_sanitize("thread"))) T unseen_load(const T* address) {
    T value;
    std::memcpy(static_cast<void*>(&value), address, sizeof(T));
    return value;
}

template <typename T>
__attribute__((noinline, no_sanitize("thread"))) void unseen_store(T* address, const T& value) {
    std::memcpy(static_cast<void*>(address), static_cast<const void*>(&value), sizeof(T));
}

// Called from functions that are always inlined into the kernel: the return address is the kernel's line.
void note_load(const void* address, size_t bytes, size_t alignment);
void note_store(const void* address, size_t bytes, size_t alignment);

template <typename T>
PREQUANT_ALWAYS_INLINE T load(const T* address) {
#ifdef PREQUANT_TRACED
    note_load(address, sizeof(T), alignof(T));
    return unseen_load(address);
#else
    if (reinterpret_cast<uintptr_t>(address) % alignof(T)) check_alignment(address, alignof(T));
    return *address;
#endif
}

template <typename T>
PREQUANT_ALWAYS_INLINE void store(T* address, const T& value) {
#ifdef PREQUANT_TRACED
    note_store(address, sizeof(T), alignof(T));
    unseen_store(address, value);
#else
    if (reinterpret_cast<uintptr_t>(address) % alignof(T)) check_alignment(address, alignof(T));
    *address = value;
#endif
}

// ---- synchronization ----

void sync_threads();
int sync_threads_count(bool predicate);
void sync_warp(uint32_t mask);
void thread_fence();

enum class Shuffle { index, up, down, butterfly };
uint64_t shuffle_bits(Shuffle kind, uint32_t mask, uint64_t bits, int argument, int width);
uint32_t ballot(uint32_t mask, bool predicate);
uint32_t match_any(uint32_t mask, uint64_t bits);

template <typename T>
T shuffle(Shuffle kind, uint32_t mask, T value, int argument, int width) {
    static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
    uint64_t bits = 0;
    std::memcpy(&bits, static_cast<const void*>(&value), sizeof(T));
    bits = shuffle_bits(kind, mask, bits, argument, width);
    std::memcpy(static_cast<void*>(&value), &bits, sizeof(T));
    return value;
}

enum class Fold { add, min, max, bit_and, bit_or, bit_xor };
template <typename T>
T reduce(Fold fold, uint32_t mask, T value);  // int32_t and uint32_t, as the hardware's redux.sync

// int, unsigned, unsigned long long; float sums in no fixed order, so kernels may not have them. Return the old value.
template <typename T>
T atomic_fold(Fold fold, T* address, T value);
template <typename T>
T atomic_exchange(T* address, T value);
template <typename T>
T atomic_compare_and_swap(T* address, T expected, T value);

// ---- PTX, for ptx.cuh ----

void cp_async_16(void* shared_to, const void* from, int source_bytes);
void cp_async_commit();
void cp_async_wait(int newest_groups_left);
void ldmatrix(uint32_t* registers, int matrices, bool is_transposed, const void* row);
uint32_t movmatrix_trans(uint32_t value);

enum class Operand { half, bfloat16 };
void mma_float(Operand operand, int k, float* d, const uint32_t* a, const uint32_t* b);      // m16n8k8, m16n8k16
void mma_int8_m16n8k32(bool a_is_signed, int32_t* d, const uint32_t* a,
                       const uint32_t* b);  // B has the other signedness
void mma_int8_m8n8k16(bool a_is_signed, int32_t* d, const uint32_t* a, const uint32_t* b);

}  // namespace prequant::emulator

// CUDA's headers make __shared__ empty for a host compiler, which would silently give every thread its own copy.
#undef __shared__
#define __shared__ prequant_error_use_PREQUANT_SHARED_or_dynamic_shared
#undef __launch_bounds__
#define __launch_bounds__(...)

#define threadIdx (::prequant::emulator::current->thread_index)
#define blockIdx (::prequant::emulator::current->block_index)
#define blockDim (::prequant::emulator::current->block_size)
#define gridDim (::prequant::emulator::current->grid_size)

#include "intrinsics.h"
