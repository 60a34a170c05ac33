// Groups the lanes' accesses into requests of a warp and counts what these cost the memory system.
#include <algorithm>
#include <unordered_map>

#include "tracer.h"

namespace prequant::emulator::tracer {

namespace {

struct Request {
    uint32_t lanes = 0;
    uint64_t address[kWarp];
    uint8_t bytes[kWarp];
};

// One instruction in one warp.
struct Site {
    uint32_t visits[32] = {};
    size_t first = 0;  // visits before it are closed
    std::vector<Request> open;
    bool is_dirty = false;
};

struct WarpRequests {
    uint32_t all_lanes = 0;
    std::vector<Site> sites;  // by the number of their Traffic
    std::vector<int> dirty;
};

std::vector<Traffic> table;
std::unordered_map<uint64_t, int> numbers;
struct Recent {
    uint64_t key = 0;
    int number = 0;
} recent[1024];
std::vector<WarpRequests> warps;
int current_kernel = 0;

int number_of(const void* where, Kind kind, bool is_shared) {
    const uint64_t key = reinterpret_cast<uint64_t>(where) << 4 | static_cast<uint64_t>(kind) << 1 | is_shared;
    Recent& slot = recent[(key >> 4 ^ key) % 1024];
    if (slot.key == key) return slot.number;
    const auto [entry, is_new] = numbers.try_emplace(key, static_cast<int>(table.size()));
    if (is_new) table.push_back({.kernel = current_kernel, .where = where, .kind = kind, .is_shared = is_shared});
    slot = {key, entry->second};
    return entry->second;
}

void count_global(Traffic& total, const Request& request, int count, const int* lanes) {
    int order[kWarp];
    std::copy(lanes, lanes + count, order);
    std::sort(order, order + count, [&](int a, int b) { return request.address[a] < request.address[b]; });
    uint64_t sectors = 0, bytes = 0, next_sector = 0, next_byte = 0;  // counted so far, in ascending order
    for (int i = 0; i < count; ++i) {
        const uint64_t begin = request.address[order[i]], end = begin + request.bytes[order[i]];
        const uint64_t first_sector = std::max(begin / 32, next_sector), last_sector = (end - 1) / 32;
        if (first_sector <= last_sector) sectors += last_sector - first_sector + 1, next_sector = last_sector + 1;
        const uint64_t first_byte = std::max(begin, next_byte);
        if (first_byte < end) bytes += end - first_byte, next_byte = end;
    }
    total.sectors += sectors;
    total.ideal_sectors += (bytes + 31) / 32;
}

// A pass serves 32 lanes of up to 4 bytes, 16 lanes of 8 or 8 lanes of 16; in it a bank gives one word per wavefront,
// to all who want that word.
void count_shared(Traffic& total, const Request& request, int width) {
    const int lanes_of_pass = width <= 4 ? kWarp : width <= 8 ? 16 : 8;
    for (int first = 0; first < kWarp; first += lanes_of_pass) {
        uint64_t words[32][32];
        int used[32] = {}, worst = 0;
        for (int lane = first; lane < first + lanes_of_pass; ++lane) {
            if (!(request.lanes >> lane & 1)) continue;
            for (uint64_t word = request.address[lane] / 4;
                 word <= (request.address[lane] + request.bytes[lane] - 1) / 4; ++word) {
                const int bank = static_cast<int>(word % 32);
                if (std::find(words[bank], words[bank] + used[bank], word) != words[bank] + used[bank]) continue;
                words[bank][used[bank]++] = word;
                worst = std::max(worst, used[bank]);
            }
        }
        total.wavefronts += static_cast<uint64_t>(worst);
        total.ideal_wavefronts += worst > 0;
    }
}

void count(Traffic& total, const Request& request) {
    int lanes[kWarp], count = 0, width = 0;
    for (uint32_t left = request.lanes; left != 0; left &= left - 1) {
        const int lane = __builtin_ctz(left);
        lanes[count++] = lane;
        width = std::max<int>(width, request.bytes[lane]);
        total.bytes += request.bytes[lane];
    }
    ++total.requests;
    total.lanes += static_cast<uint64_t>(count);
    if (total.is_shared) {
        count_shared(total, request, width);
    } else {
        count_global(total, request, count, lanes);
    }
}

}  // namespace

void begin_requests(int kernel) {
    current_kernel = kernel;
    numbers.clear();  // an instruction of two kernels, as an inlined function has, counts for each of them
    std::fill(std::begin(recent), std::end(recent), Recent{});
    for (size_t i = 0; i < table.size(); ++i)
        if (table[i].kernel == kernel)
            numbers[reinterpret_cast<uint64_t>(table[i].where) << 4 | static_cast<uint64_t>(table[i].kind) << 1 |
                    table[i].is_shared] = static_cast<int>(i);
}

void begin_requests_of_block(const Block& block) {
    warps.assign(block.warp_count, {});
    for (uint32_t i = 0; i < block.warp_count; ++i) warps[i].all_lanes = block.warps[i].live;
}

void add_access(const void* where, Kind kind, bool is_shared, uintptr_t address, int bytes) {
    const size_t number = static_cast<size_t>(number_of(where, kind, is_shared));
    WarpRequests& warp = warps[current->warp];
    if (warp.sites.size() <= number) warp.sites.resize(number + 1);
    Site& site = warp.sites[number];
    if (!site.is_dirty) {
        site.is_dirty = true;
        warp.dirty.push_back(static_cast<int>(number));
    }
    const uint32_t lane = current->lane;
    // A lane that comes late: its request is closed.
    if (site.visits[lane] < site.first) site.visits[lane] = static_cast<uint32_t>(site.first);
    const size_t index = site.visits[lane]++ - site.first;
    if (site.open.size() <= index) site.open.resize(index + 1);
    Request& request = site.open[index];
    request.lanes |= 1u << lane;
    request.address[lane] = address;
    request.bytes[lane] = static_cast<uint8_t>(bytes);
    // The usual case: no need to wait for the warp to converge.
    if (index == 0 && site.open.size() == 1 && request.lanes == warp.all_lanes) {
        count(table[number], request);
        site.open.clear();
        ++site.first;
    }
}

void add_ldmatrix(const void* where, const uint32_t* rows, int lanes) {
    Request request;
    for (int lane = 0; lane < lanes; ++lane) {
        request.lanes |= 1u << lane;
        request.address[lane] = rows[lane];
        request.bytes[lane] = 16;
    }
    count(table[static_cast<size_t>(number_of(where, Kind::ldmatrix, true))], request);
}

void close_requests(uint32_t warp_number) {
    WarpRequests& warp = warps[warp_number];
    for (const int number : warp.dirty) {
        Site& site = warp.sites[static_cast<size_t>(number)];
        for (const Request& request : site.open)
            if (request.lanes != 0) count(table[static_cast<size_t>(number)], request);
        site.open.clear();
        site.first = 0;
        std::fill(std::begin(site.visits), std::end(site.visits), 0u);
        site.is_dirty = false;
    }
    warp.dirty.clear();
}

const std::vector<Traffic>& traffic() { return table; }

void forget_traffic() {
    table.clear();
    warps.clear();
}

}  // namespace prequant::emulator::tracer
