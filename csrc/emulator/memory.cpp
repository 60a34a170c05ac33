// Shared memory of a block, and the checks of single accesses.
#include <algorithm>

#include "internal.h"

#if PREQUANT_ASAN
#include <sanitizer/asan_interface.h>
#endif

namespace prequant::emulator {

void* dynamic_shared() { return current->block->shared + current->block->dynamic_offset; }

void* static_shared(const void* key, size_t bytes, size_t alignment) {
    Block* block = current->block;
    for (const StaticVariable& known : block->statics)
        if (known.key == key) return block->shared + known.offset;
    alignment = std::max<size_t>(alignment, 16);
    const size_t offset = (block->static_bytes + alignment - 1) / alignment * alignment;
    if (offset + bytes + kRedZone > kStaticWindow) fail("more than %zu bytes of static shared memory", kStaticWindow);
    block->static_bytes = offset + bytes + kRedZone;
    block->statics.push_back({key, offset, bytes});
#if PREQUANT_ASAN
    __asan_unpoison_memory_region(block->shared + offset, bytes);
#endif
    if (options.is_poisoned) std::memset(block->shared + offset, 0xff, bytes);
    if (!PREQUANT_ASAN) std::memset(block->shared + offset + bytes, kUntouched, kRedZone);
    return block->shared + offset;
}

// The sanitizer sees a stray access as it happens; without it, a stray write shows at the end of the block.
void check_red_zones(Block* block) {
    const auto check = [&](const unsigned char* zone, const char* what) {
        for (size_t i = 0; i < kRedZone; ++i) {
            if (zone[i] == kUntouched || !block->error.empty()) continue;
            block->error = "block " + std::to_string(block->number) + " wrote past the end of " + what +
                           " in shared memory, " + std::to_string(i) + " bytes";
        }
    };
    if (PREQUANT_ASAN) return;
    check(block->shared + block->shared_bytes, "its dynamic part");
    for (const StaticVariable& variable : block->statics)
        check(block->shared + variable.offset + variable.bytes, "a variable");
}

uint32_t shared_offset(const void* address) {
    const Block* block = current->block;
    const ptrdiff_t offset = static_cast<const unsigned char*>(address) - block->shared;
    if (offset < 0 || static_cast<size_t>(offset) > block->shared_bytes)
        fail("%p is not an address of shared memory", address);
    return static_cast<uint32_t>(offset);
}

void check_shared(uint32_t offset, uint32_t bytes, const char* what) {
    if (offset % bytes != 0) fail("%s: shared address %u is not a multiple of %u", what, offset, bytes);
    if (offset + bytes > current->block->shared_bytes)
        fail("%s: shared address %u + %u is past the end, %zu", what, offset, bytes, current->block->shared_bytes);
}

void check_alignment(const void* address, size_t bytes) {
    if (reinterpret_cast<uintptr_t>(address) % bytes != 0)
        fail("misaligned address %p for an access of %zu bytes", address, bytes);
}

void note_load(const void* address, size_t bytes, size_t alignment) {
    check_alignment(address, alignment);
    if (hooks != nullptr) hooks->access(__builtin_return_address(0), address, static_cast<int>(bytes), Access::load);
}

void note_store(const void* address, size_t bytes, size_t alignment) {
    check_alignment(address, alignment);
    if (hooks != nullptr) hooks->access(__builtin_return_address(0), address, static_cast<int>(bytes), Access::store);
}

void thread_fence() {
    if (hooks != nullptr) hooks->fence();
}

// What torch allocates for results and scratch holds old numbers on a GPU; here it holds NaN, so that reading it shows.
void buffer_allocated(void* address, size_t bytes, bool is_fresh) {
    if (is_fresh && options.is_poisoned && bytes > 0) std::memset(address, 0xff, bytes);
    if (hooks != nullptr) hooks->buffer_allocated(address, bytes, is_fresh);
}

}  // namespace prequant::emulator
