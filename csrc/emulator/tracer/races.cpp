// Who touched a byte last, and was that ordered before the access at hand?
//
// Ordered are: one thread's own accesses; two threads of a block with a __syncthreads between them; two lanes of a warp
// with a __syncwarp between them; atomics with each other; two blocks where the earlier one went through __threadfence
// and then an atomic, and the later one through an atomic after that. The bytes of a cp.async belong to its thread from
// its wait on.
#include <algorithm>
#include <cstdio>

#include "tracer.h"

namespace prequant::emulator::tracer {

namespace {

struct Mark {
    int32_t thread = -1;  // none
    uint32_t warp = 0, block = 0, epoch = 0, warp_epoch = 0, clock = 0;
    bool is_atomic = false;
    const void* where = nullptr;
};

enum class Readers : uint8_t { one, several_of_a_warp, of_several_warps };

struct Cell {
    uint32_t stamp = 0;  // an older stamp: nothing known
    bool is_copy_open = false, is_initialized = false;
    Readers readers = Readers::one;
    Mark writer, reader;
};

// A reader that is no thread: ldmatrix reads for other lanes than the one that gives the row.
constexpr int32_t kWholeWarpReads = 0x10000;

std::vector<Cell> shared_cells;
const Block* block_now = nullptr;
uint32_t shared_stamp = 0, global_stamp = 0, clock_now = 0;
std::vector<uint32_t> released, acquired;  // by block: the clock of its last release and acquire
std::vector<bool> has_fenced;  // by thread of the block

struct Region {
    std::vector<Cell> cells;
    bool is_initialized;
};
std::vector<Buffer> known;
std::vector<Region> regions;  // one for each of `known`

Mark mark(const void* where, bool is_atomic, bool is_whole_warp) {
    const uint32_t warp = current->warp;
    return {.thread = static_cast<int32_t>(is_whole_warp ? kWholeWarpReads + warp : current->linear),
            .warp = warp,
            .block = block_now->number,
            .epoch = block_now->epoch,
            .warp_epoch = block_now->warps[warp].epoch,
            .clock = clock_now,
            .is_atomic = is_atomic,
            .where = where};
}

bool is_ordered(const Mark& earlier, const Mark& now) {
    if (earlier.thread < 0) return true;
    if (earlier.is_atomic && now.is_atomic) return true;
    if (earlier.block != now.block)
        return released[earlier.block] > earlier.clock && acquired[now.block] > released[earlier.block];
    if (earlier.thread == now.thread || earlier.epoch != now.epoch) return true;
    return earlier.warp == now.warp && earlier.warp_epoch != now.warp_epoch;
}

const char* race_name(bool is_shared, const char* shared, const char* global) { return is_shared ? shared : global; }

void read(Cell& cell, const Mark& now, bool is_shared) {
    if (!is_ordered(cell.writer, now))
        add_finding(
            race_name(is_shared, "race in shared memory: read after write", "race in global memory: read after write"),
            now.where, cell.writer.where);
    const bool is_same_span =
        cell.reader.thread >= 0 && cell.reader.block == now.block && cell.reader.epoch == now.epoch;
    if (!is_same_span) {
        cell.readers =
            cell.reader.thread >= 0 && cell.reader.block != now.block ? Readers::of_several_warps : Readers::one;
    } else if (cell.reader.warp != now.warp) {
        cell.readers = Readers::of_several_warps;
    } else if (cell.reader.thread != now.thread && cell.readers == Readers::one) {
        cell.readers = Readers::several_of_a_warp;
    }
    cell.reader = now;
}

void write(Cell& cell, const Mark& now, bool is_shared) {
    if (!is_ordered(cell.writer, now))
        add_finding(race_name(is_shared, "race in shared memory: write after write",
                              "race in global memory: write after write"),
                    now.where, cell.writer.where);
    const Mark& reader = cell.reader;
    const bool is_same_span = reader.thread >= 0 && reader.block == now.block && reader.epoch == now.epoch;
    const bool hides_a_reader = is_same_span && (cell.readers == Readers::of_several_warps ||
                                                 (cell.readers == Readers::several_of_a_warp &&
                                                  (reader.warp != now.warp || reader.warp_epoch == now.warp_epoch)));
    if (!is_ordered(reader, now) || hides_a_reader)
        add_finding(
            race_name(is_shared, "race in shared memory: write after read", "race in global memory: write after read"),
            now.where, reader.where);
    cell.writer = now;
    cell.reader = Mark{};
    cell.readers = Readers::one;
    cell.is_initialized = true;
}

Cell& fresh(Cell& cell, uint32_t stamp, bool keeps_initialized) {
    if (cell.stamp != stamp) {
        const bool is_initialized = keeps_initialized && cell.is_initialized;
        cell = Cell{};
        cell.stamp = stamp;
        cell.is_initialized = is_initialized;
    }
    return cell;
}

void touch_shared_cells(uint32_t offset, int bytes, Access kind, const Mark& now, bool is_copy) {
    for (uint32_t at = offset; at < offset + static_cast<uint32_t>(bytes); ++at) {
        Cell& cell = fresh(shared_cells[at], shared_stamp, false);
        if (cell.is_copy_open && !(is_copy && cell.writer.thread == now.thread))
            add_finding("data of a cp.async used before its wait", now.where, cell.writer.where);
        if (kind != Access::store && !cell.is_initialized)
            add_finding("read of shared memory that was never written", now.where);
        if (kind == Access::load) {
            read(cell, now, true);
        } else {
            write(cell, now, true);
            cell.is_copy_open = is_copy;
        }
    }
}

}  // namespace

void begin_races(uint64_t blocks) {
    ++global_stamp;
    clock_now = 1;
    released.assign(blocks, 0);
    acquired.assign(blocks, 0);
}

void begin_races_of_block(const Block& block) {
    block_now = &block;
    ++shared_stamp;
    ++clock_now;
    if (shared_cells.size() < block.shared_bytes) shared_cells.resize(block.shared_bytes);
    has_fenced.assign(block.threads, false);
}

void touch_shared(const void* where, uint32_t offset, int bytes, Access kind) {
    const auto end = offset + static_cast<size_t>(bytes);
    const bool is_dynamic = offset >= block_now->dynamic_offset;
    const auto holds = [&](const StaticVariable& variable) {
        return offset >= variable.offset && end <= variable.offset + variable.bytes;
    };
    if (end > block_now->shared_bytes ||
        (!is_dynamic && std::none_of(block_now->statics.begin(), block_now->statics.end(), holds)))
        return add_finding("access outside of shared memory", where, nullptr,
                           std::to_string(bytes) + " bytes at " + std::to_string(offset));
    touch_shared_cells(offset, bytes, kind, mark(where, kind == Access::atomic, false), false);
}

void touch_shared_by_warp(const void* where, uint32_t offset, int bytes) {
    touch_shared_cells(offset, bytes, Access::load, mark(where, false, true), false);
}

void copy_issued(const void* where, uint32_t offset, int bytes) {
    touch_shared_cells(offset, bytes, Access::store, mark(where, false, false), true);
}

void copy_landed(uint32_t offset, int bytes) {
    for (uint32_t at = offset; at < offset + static_cast<uint32_t>(bytes); ++at) {
        Cell& cell = shared_cells[at];
        cell.is_copy_open = false;
        cell.writer.epoch = block_now->epoch;
        cell.writer.warp_epoch = block_now->warps[current->warp].epoch;
    }
}

void fence() { has_fenced[current->linear] = true; }

// ---- global memory ----

void add_buffer(const void* address, size_t bytes, bool is_writable, bool is_initialized, std::string name) {
    const auto begin = reinterpret_cast<uintptr_t>(address), end = begin + bytes;
    for (size_t i = known.size(); i-- > 0;) {  // memory that was freed and is somebody else's now
        if (known[i].begin < end && begin < known[i].end) {
            known.erase(known.begin() + static_cast<ptrdiff_t>(i));
            regions.erase(regions.begin() + static_cast<ptrdiff_t>(i));
        }
    }
    const size_t sectors = (end + 31) / 32 - begin / 32;
    known.push_back({begin, end, is_writable, std::move(name), std::vector<bool>(sectors), std::vector<bool>(sectors)});
    regions.push_back({{}, is_initialized});
}

Buffer* find_buffer(uintptr_t address) {
    for (Buffer& buffer : known)
        if (address >= buffer.begin && address < buffer.end) return &buffer;
    return nullptr;
}

void touch_global(const void* where, uintptr_t address, int bytes, Access kind) {
    Buffer* buffer = find_buffer(address);
    if (buffer == nullptr || address + static_cast<uintptr_t>(bytes) > buffer->end) {
        const uint3 block = current->block_index;
        char details[160];
        std::snprintf(details, sizeof details, "%s of %d bytes by thread %u of block (%u,%u,%u)",
                      kind == Access::load ? "read" : "write", bytes, current->linear, block.x, block.y, block.z);
        return add_finding("access outside of every buffer", where, nullptr, details);
    }
    if (kind != Access::load && !buffer->is_writable) add_finding("write to an input", where, nullptr, buffer->name);
    const uintptr_t first = buffer->begin / 32;
    for (uintptr_t sector = address / 32; sector <= (address + static_cast<uintptr_t>(bytes) - 1) / 32; ++sector) {
        if (kind != Access::store) buffer->read_sectors[sector - first] = true;
        if (kind != Access::load) buffer->written_sectors[sector - first] = true;
    }
    if (!buffer->is_writable) return;  // nobody writes it, so nothing can race
    if (kind == Access::atomic) {
        acquired[block_now->number] = ++clock_now;
        if (has_fenced[current->linear]) released[block_now->number] = ++clock_now;
    }
    Region& region = regions[static_cast<size_t>(buffer - known.data())];
    if (region.cells.empty()) region.cells.resize(buffer->end - buffer->begin);
    const Mark now = mark(where, kind == Access::atomic, false);
    for (uintptr_t at = address - buffer->begin; at < address - buffer->begin + static_cast<uintptr_t>(bytes); ++at) {
        Cell& cell = fresh(region.cells[at], global_stamp, true);
        if (kind != Access::store && !region.is_initialized && !cell.is_initialized)
            add_finding("read of global memory that was never written", where, nullptr, buffer->name);
        if (kind == Access::load) {
            read(cell, now, false);
        } else {
            write(cell, now, false);
        }
    }
}

const std::vector<Buffer>& buffers() { return known; }

void forget_buffers() {
    known.clear();
    regions.clear();
}

}  // namespace prequant::emulator::tracer
