// What the traced library finds out about kernels: memory traffic and faults, each with its place in the source.
//
// The kernels are compiled with -fsanitize=thread and linked against the functions of tracer.cpp instead of that
// sanitizer's library: every load and store of theirs becomes a call, and its return address names the instruction.
// Accesses to a fiber's own stack are registers on a GPU and are left out. Single OS thread.
#pragma once

#include <map>
#include <string>
#include <tuple>
#include <vector>

#include "../internal.h"

namespace prequant::emulator::tracer {

// ---- traffic.cpp ----
//
// The k-th visit of each lane to one instruction, since its warp last converged, forms one request of the warp.

enum class Kind : uint8_t { load, store, atomic, cp_async, ldmatrix };

// One instruction's requests, added up.
//   sectors      32-byte pieces of global memory that the requests touch; ideal: as many as the bytes asked for
//                would fill
//   wavefronts   passes over the banks of shared memory; ideal: as if no two words of a pass fell into one bank
struct Traffic {
    int kernel;
    const void* where;
    Kind kind;
    bool is_shared;
    uint64_t requests = 0, lanes = 0, bytes = 0, sectors = 0, ideal_sectors = 0, wavefronts = 0, ideal_wavefronts = 0;
};

void begin_requests(int kernel);
void begin_requests_of_block(const Block& block);
void add_access(const void* where, Kind kind, bool is_shared, uintptr_t address, int bytes);
void add_ldmatrix(const void* where, const uint32_t* rows, int lanes);
void close_requests(uint32_t warp);
const std::vector<Traffic>& traffic();
void forget_traffic();

// ---- races.cpp: global memory that kernels may touch, and shared memory: who touched a byte last ----

struct Buffer {
    uintptr_t begin, end;
    bool is_writable;
    std::string name;
    std::vector<bool> read_sectors, written_sectors;  // each counted once: the least traffic
};

void begin_races(uint64_t blocks);
void begin_races_of_block(const Block& block);
void add_buffer(const void* address, size_t bytes, bool is_writable, bool is_initialized, std::string name);
Buffer* find_buffer(uintptr_t address);
void touch_global(const void* where, uintptr_t address, int bytes, Access kind);
void touch_shared(const void* where, uint32_t offset, int bytes, Access kind);
void touch_shared_by_warp(const void* where, uint32_t offset, int bytes);
void copy_issued(const void* where, uint32_t offset, int bytes);
void copy_landed(uint32_t offset, int bytes);
void fence();
const std::vector<Buffer>& buffers();
void forget_buffers();

// ---- tracer.cpp ----

struct Finding {
    std::string kind, kernel, details;  // details of the first time
    const void *where, *other;          // other: the earlier access of a race, or null
    uint64_t count = 0;
};

struct Launch {
    std::string kernel;
    dim3 grid, block;
    size_t dynamic_bytes, static_bytes;
};

void add_finding(const char* kind, const void* where, const void* other = nullptr, const std::string& details = "");
void start();  // forgets what it knew and listens
void stop();
const std::vector<Launch>& launches();
std::vector<Finding> findings();
const std::string& kernel_name(int kernel);
uintptr_t library_offset(const void* where);  // for addr2line: of the call that returns to `where`

}  // namespace prequant::emulator::tracer
