// Warp collectives and atomics.
#include "internal.h"

namespace prequant::emulator {

void collective(const char* name, uint32_t mask, void* argument, LaneOperation operation) {
    Warp& warp = current->block->warps[current->warp];
    const uint32_t bit = 1u << current->lane;
    if (!(mask & bit)) fail("%s: the calling lane is not in mask %08x", name, mask);
    if (mask & ~warp.live)
        fail("%s: mask %08x names lanes that exited or never were (live %08x)", name, mask, warp.live);
    Collective* mine = nullptr;
    Collective* unused = nullptr;
    for (Collective& other : warp.collectives) {
        if (other.name == nullptr) {
            if (unused == nullptr) unused = &other;
        } else if (other.mask & mask) {
            if (other.mask != mask || other.name != name)
                fail("divergent warp collectives: %s mask %08x, but %s mask %08x is waiting", name, mask, other.name,
                     other.mask);
            mine = &other;
        }
    }
    if (mine == nullptr) {
        if (unused == nullptr) fail("%s: the emulator follows no more than 4 collectives of one warp at a time", name);
        mine = unused;
        mine->name = name, mine->mask = mask, mine->arrived = 0;
    }
    mine->arguments[current->lane] = argument;
    mine->arrived |= bit;
    if (mine->arrived != mask) return switch_to_scheduler(false);
    mine->name = nullptr;
    if (hooks != nullptr && mask == warp.live) hooks->warp_converged(current->warp);
    operation(mine->arguments, mask);
    warp.ready |= mask & ~bit;  // the last lane goes on at once
}

template <typename Each>
static void for_each_lane(uint32_t mask, Each each) {
    for (; mask != 0; mask &= mask - 1) each(__builtin_ctz(mask));
}

void sync_warp(uint32_t mask) {
    collective("__syncwarp", mask, nullptr, [](void**, uint32_t) { ++current->block->warps[current->warp].epoch; });
}

namespace {

struct Shuffled {
    uint64_t in, out;
    int source;
};

struct Voted {
    uint64_t in;
    uint32_t out;
};

}  // namespace

uint64_t shuffle_bits(Shuffle kind, uint32_t mask, uint64_t bits, int argument, int width) {
    const int lane = static_cast<int>(current->lane), segment = lane & ~(width - 1);
    int source = lane;
    switch (kind) {
        case Shuffle::index: source = segment + (argument & (width - 1)); break;
        case Shuffle::up: source = lane - argument >= segment ? lane - argument : lane; break;
        case Shuffle::down: source = lane + argument < segment + width ? lane + argument : lane; break;
        case Shuffle::butterfly: source = (lane ^ argument) < segment + width ? lane ^ argument : lane; break;
    }
    if (!(mask >> source & 1)) fail("__shfl_sync reads lane %d, which is not in mask %08x", source, mask);
    Shuffled mine{bits, 0, source};
    collective("__shfl_sync", mask, &mine, [](void** arguments, uint32_t lanes) {
        for_each_lane(lanes, [&](int lane) {
            auto* to = static_cast<Shuffled*>(arguments[lane]);
            to->out = static_cast<Shuffled*>(arguments[to->source])->in;
        });
    });
    return mine.out;
}

uint32_t ballot(uint32_t mask, bool predicate) {
    Voted mine{predicate, 0};
    collective("__ballot_sync", mask, &mine, [](void** arguments, uint32_t lanes) {
        uint32_t votes = 0;
        for_each_lane(
            lanes, [&](int lane) { votes |= static_cast<uint32_t>(static_cast<Voted*>(arguments[lane])->in) << lane; });
        for_each_lane(lanes, [&](int lane) { static_cast<Voted*>(arguments[lane])->out = votes; });
    });
    return mine.out;
}

uint32_t match_any(uint32_t mask, uint64_t bits) {
    Voted mine{bits, 0};
    collective("__match_any_sync", mask, &mine, [](void** arguments, uint32_t lanes) {
        for_each_lane(lanes, [&](int lane) {
            auto* to = static_cast<Voted*>(arguments[lane]);
            for_each_lane(lanes, [&](int other) {
                to->out |= uint32_t(static_cast<Voted*>(arguments[other])->in == to->in) << other;
            });
        });
    });
    return mine.out;
}

template <typename T>
static T folded(Fold fold, T a, T b) {
    switch (fold) {
        case Fold::add:
            return static_cast<T>(static_cast<std::make_unsigned_t<T>>(a) + static_cast<std::make_unsigned_t<T>>(b));
        case Fold::min: return a < b ? a : b;
        case Fold::max: return a < b ? b : a;
        case Fold::bit_and: return a & b;
        case Fold::bit_or: return a | b;
        case Fold::bit_xor: return a ^ b;
    }
    __builtin_unreachable();
}

template <typename T>
T reduce(Fold fold, uint32_t mask, T value) {
    struct Reduced {
        Fold fold;
        T value;
    } mine{fold, value};
    collective("__reduce_sync", mask, &mine, [](void** arguments, uint32_t lanes) {
        const Reduced* first = static_cast<Reduced*>(arguments[__builtin_ctz(lanes)]);
        T result = first->value;
        for_each_lane(lanes & (lanes - 1), [&](int lane) {
            result = folded(first->fold, result, static_cast<Reduced*>(arguments[lane])->value);
        });
        for_each_lane(lanes, [&](int lane) { static_cast<Reduced*>(arguments[lane])->value = result; });
    });
    return mine.value;
}
template int32_t reduce<int32_t>(Fold, uint32_t, int32_t);
template uint32_t reduce<uint32_t>(Fold, uint32_t, uint32_t);

// Atomic for the OS threads that share the blocks; the fibers of one never interrupt each other.
template <typename T, typename Change>
static T change_atomically(const void* where, T* address, Change change) {
    check_alignment(address, sizeof(T));
    if (hooks != nullptr) hooks->access(where, address, sizeof(T), Access::atomic);
    T old = __atomic_load_n(address, __ATOMIC_RELAXED);
    while (!__atomic_compare_exchange_n(address, &old, change(old), true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
    return old;
}

template <typename T>
T atomic_fold(Fold fold, T* address, T value) {
    return change_atomically(__builtin_return_address(0), address, [&](T old) { return folded(fold, old, value); });
}

template <typename T>
T atomic_exchange(T* address, T value) {
    return change_atomically(__builtin_return_address(0), address, [&](T) { return value; });
}

template <typename T>
T atomic_compare_and_swap(T* address, T expected, T value) {
    return change_atomically(__builtin_return_address(0), address,
                             [&](T old) { return old == expected ? value : old; });
}

#define PREQUANT_ATOMICS(T)                 \
    template T atomic_fold<T>(Fold, T*, T); \
    template T atomic_exchange<T>(T*, T);   \
    template T atomic_compare_and_swap<T>(T*, T, T);
PREQUANT_ATOMICS(int)
PREQUANT_ATOMICS(unsigned)
PREQUANT_ATOMICS(unsigned long long)
#undef PREQUANT_ATOMICS

}  // namespace prequant::emulator
