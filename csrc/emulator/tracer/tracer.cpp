// The functions that instrumented kernels call, and where their accesses go.
#include "tracer.h"

#include <dlfcn.h>
#include <link.h>

#include <algorithm>

namespace prequant::emulator::tracer {

namespace {

std::vector<std::string> kernels;
std::vector<Launch> known_launches;
std::map<std::tuple<std::string, const void*, const void*>, Finding> known_findings;
const Block* block_now = nullptr;
int kernel_now = 0;

// Where this library lies: kernels read constants of it, which are no device memory.
struct Extent {
    uintptr_t begin, end;
};

Extent library_extent() {
    static const Extent extent = [] {
        Dl_info info{};
        dladdr(reinterpret_cast<void*>(&library_extent), &info);
        Extent found{reinterpret_cast<uintptr_t>(info.dli_fbase), 0};
        dl_iterate_phdr(
            [](dl_phdr_info* library, size_t, void* result) {
                auto* extent = static_cast<Extent*>(result);
                if (library->dlpi_addr != extent->begin) return 0;
                for (int i = 0; i < library->dlpi_phnum; ++i)
                    if (library->dlpi_phdr[i].p_type == PT_LOAD)
                        extent->end = std::max<uintptr_t>(
                            extent->end, extent->begin + library->dlpi_phdr[i].p_vaddr + library->dlpi_phdr[i].p_memsz);
                return 1;
            },
            &found);
        return found;
    }();
    return extent;
}

void grid_begins(const char* name, dim3 grid, dim3 block, size_t shared_bytes) {
    const auto entry = std::find(kernels.begin(), kernels.end(), name);
    kernel_now = static_cast<int>(entry - kernels.begin());
    if (entry == kernels.end()) kernels.push_back(name);
    known_launches.push_back({name, grid, block, shared_bytes, 0});
    begin_requests(kernel_now);
    begin_races(uint64_t(grid.x) * grid.y * grid.z);
}

void block_begins(Block* block) {
    block_now = block;
    begin_requests_of_block(*block);
    begin_races_of_block(*block);
}

void block_ends(Block* block) {
    for (uint32_t warp = 0; warp < block->warp_count; ++warp) close_requests(warp);
    size_t& static_bytes = known_launches.back().static_bytes;
    static_bytes = std::max(static_bytes, block->static_bytes);
    block_now = nullptr;
}

Kind kind_of(Access access) {
    return access == Access::load ? Kind::load : access == Access::store ? Kind::store : Kind::atomic;
}

// A register of the GPU, or the host's: the fiber's stack, threadIdx and its kin, kernel arguments on the launching
// thread's stack, constants.
bool is_private(uintptr_t address) {
    const auto within = [&](const void* begin, size_t bytes) {
        return address - reinterpret_cast<uintptr_t>(begin) < bytes;
    };
    constexpr size_t kLaunchStack = 8 << 20;
    const Extent library = library_extent();
    return within(current->fiber->stack, current->fiber->stack_bytes) ||
           within(block_now->fibers, sizeof(Fiber) * block_now->threads) || within(&current, sizeof current) ||
           within(block_now->scheduler_frame, kLaunchStack) || (address >= library.begin && address < library.end);
}

void access(const void* where, const void* pointer, int bytes, Access kind) {
    const auto address = reinterpret_cast<uintptr_t>(pointer);
    if (address - reinterpret_cast<uintptr_t>(block_now->shared) < block_now->shared_bytes) {
        add_access(where, kind_of(kind), true, address, bytes);
        return touch_shared(where, static_cast<uint32_t>(address - reinterpret_cast<uintptr_t>(block_now->shared)),
                            bytes, kind);
    }
    add_access(where, kind_of(kind), false, address, bytes);
    touch_global(where, address, bytes, kind);
}

void instrumented_access(const void* where, const void* pointer, int bytes, Access kind) {
    if (hooks == nullptr || current == nullptr || block_now == nullptr ||
        is_private(reinterpret_cast<uintptr_t>(pointer)))
        return;
    access(where, pointer, bytes, kind);
}

void ldmatrix(const void* where, const uint32_t* rows, int lanes) {
    add_ldmatrix(where, rows, lanes);
    for (int lane = 0; lane < lanes; ++lane) touch_shared_by_warp(where, rows[lane], 16);
}

void issue(const void* where, uint32_t offset, int bytes) {
    add_access(where, Kind::cp_async, true, reinterpret_cast<uintptr_t>(block_now->shared) + offset, bytes);
    copy_issued(where, offset, bytes);
}

void allocated(const void* address, size_t bytes, bool is_fresh) {
    add_buffer(address, bytes, true, !is_fresh, "allocated by the operator");
}

Hooks tracing_hooks = {grid_begins, block_begins, block_ends, close_requests, access,
                       fence,       ldmatrix,     issue,      copy_landed,    allocated};

}  // namespace

void add_finding(const char* kind, const void* where, const void* other, const std::string& details) {
    Finding& finding = known_findings[{kind, where, other}];
    if (finding.count++ == 0) finding = {kind, kernels[static_cast<size_t>(kernel_now)], details, where, other, 1};
}

void start() {
    forget_traffic();
    forget_buffers();
    kernels.clear();
    known_launches.clear();
    known_findings.clear();
    hooks = &tracing_hooks;
}

void stop() { hooks = nullptr; }

const std::vector<Launch>& launches() { return known_launches; }
const std::string& kernel_name(int kernel) { return kernels[static_cast<size_t>(kernel)]; }

std::vector<Finding> findings() {
    std::vector<Finding> list;
    for (const auto& [key, finding] : known_findings) list.push_back(finding);
    return list;
}

uintptr_t library_offset(const void* where) {
    return where == nullptr ? 0 : reinterpret_cast<uintptr_t>(where) - library_extent().begin - 1;
}

}  // namespace prequant::emulator::tracer

// ---- what the compiler calls ----

#define PREQUANT_HERE __builtin_return_address(0)
#define PREQUANT_SEE(bytes)                                                                                          \
    void __tsan_read##bytes(void* p) {                                                                               \
        prequant::emulator::tracer::instrumented_access(PREQUANT_HERE, p, bytes, prequant::emulator::Access::load);  \
    }                                                                                                                \
    void __tsan_write##bytes(void* p) {                                                                              \
        prequant::emulator::tracer::instrumented_access(PREQUANT_HERE, p, bytes, prequant::emulator::Access::store); \
    }                                                                                                                \
    void __tsan_unaligned_read##bytes(void* p) {                                                                     \
        prequant::emulator::tracer::instrumented_access(PREQUANT_HERE, p, bytes, prequant::emulator::Access::load);  \
    }                                                                                                                \
    void __tsan_unaligned_write##bytes(void* p) {                                                                    \
        prequant::emulator::tracer::instrumented_access(PREQUANT_HERE, p, bytes, prequant::emulator::Access::store); \
    }

extern "C" {
PREQUANT_SEE(1)
PREQUANT_SEE(2)
PREQUANT_SEE(4)
PREQUANT_SEE(8)
PREQUANT_SEE(16)
void __tsan_read_range(void* p, size_t bytes) {
    prequant::emulator::tracer::instrumented_access(PREQUANT_HERE, p, static_cast<int>(bytes),
                                                    prequant::emulator::Access::load);
}
void __tsan_write_range(void* p, size_t bytes) {
    prequant::emulator::tracer::instrumented_access(PREQUANT_HERE, p, static_cast<int>(bytes),
                                                    prequant::emulator::Access::store);
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
// Of guard variables.
unsigned char __tsan_atomic8_load(const volatile void* p, int) {
    return *static_cast<const volatile unsigned char*>(p);
}
}
