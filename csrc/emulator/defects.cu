// A kernel that is right, and the same kernel with one defect each: tests show that the emulator finds them all.
//
// Tile b of in (rows, 32) float32 is 32 rows of eight 16-byte units. out (tiles, 8, 32) units: the same, unit by unit
// instead of row by row; missing rows are 0. A thread brings one unit to shared memory and takes another one away:
//
//   unit c of row r lies at 8 r + (c ^ r % 8)      thread t brings unit t % 8 of row t / 8 and takes unit t / 32 of
//                                                  row t % 32; thanks to the ^, eight neighbouring lanes of either find
//                                                  32 different banks
#include <cstring>

#include "../cuda/ptx.cuh"

namespace prequant::cuda {

namespace {

enum class Defect {
    none,
    missing_barrier,
    missing_wait,
    missing_swizzle,
    missing_zeros,
    missing_warp_barrier,
    strided_stores,
    reads_past_the_input,
    writes_past_the_output,
    writes_to_the_input,
    copies_past_shared_memory,
    stores_past_shared_memory,
    misaligned_load,
    divergent_barrier,
    barrier_after_exit,
    shuffle_after_exit,
    wrong_mask,
    different_collectives,
    deadlock,
    blocks_overlap,
};

using Unit = Vector<float, 4>;
constexpr int kThreads = 256, kRows = 32, kRowUnits = 8;

template <Defect kDefect>
__global__ void __launch_bounds__(kThreads)
    units_kernel(const float* __restrict__ in, int64_t rows, float* __restrict__ out) {
    constexpr auto is = [](Defect defect) { return kDefect == defect; };
    Unit* tile = dynamic_shared<Unit>();
    const int t = threadIdx.x;
    const auto place = [is](int r, int c) { return r * kRowUnits + (is(Defect::missing_swizzle) ? c : c ^ r % 8); };
    {
        const int r = t / kRowUnits, c = t % kRowUnits;
        const int64_t row = int64_t(blockIdx.x) * kRows + r;
        const bool exists = row < rows || is(Defect::reads_past_the_input);
        Unit* to = tile + place(r, c) + (is(Defect::copies_past_shared_memory) ? 1 : 0);
        const float* from = in + (exists ? row * kRows + c * 4 : 0);
        if (exists || !is(Defect::missing_zeros)) cp_async_16(to, from, exists ? 16 : 0);
        cp_async_commit();
        if (is(Defect::stores_past_shared_memory)) store(tile + t + 1, Unit{});
    }
    if (!is(Defect::missing_wait)) cp_async_wait<0>();
    if (is(Defect::barrier_after_exit) && t == 200) return;
    if (is(Defect::divergent_barrier) && t < 48) __syncthreads();
    if (!is(Defect::missing_barrier)) __syncthreads();

    const int r = t % kRows, c = t / kRows;
    Unit unit = load<Unit>(tile + place(r, c));
    if (is(Defect::misaligned_load)) unit = load<Unit>(reinterpret_cast<const float*>(tile) + 1);
    if (is(Defect::shuffle_after_exit) && t % 32 == 7) return;
    if (is(Defect::shuffle_after_exit)) unit.at[0] = __shfl_xor_sync(0xffffffffu, unit.at[0], 0);
    if (is(Defect::wrong_mask)) unit.at[0] = __shfl_xor_sync(0x0000ffffu, unit.at[0], 0);
    if (is(Defect::different_collectives))
        unit.at[1] += t % 2 ? float(__ballot_sync(0xffffffffu, 1)) : __shfl_sync(0xffffffffu, 1.0f, 0);
    if (is(Defect::deadlock)) {
        if (t % 32 < 16) {
            __syncwarp();
        } else {
            __syncthreads();
        }
    }
    if (is(Defect::missing_warp_barrier)) {  // the warp's lanes hand their units round
        __syncthreads();
        store(tile + t, unit);
        unit = load<Unit>(tile + (t ^ 1));
    }
    const int64_t to = is(Defect::strided_stores) ? r * kRowUnits + c : c * kRows + r;
    store(out + (int64_t(blockIdx.x) * kThreads + to + (is(Defect::writes_past_the_output) ? 1 : 0)) * 4, unit);
    if (is(Defect::writes_to_the_input)) store(const_cast<float*>(in), in[0]);
    if (is(Defect::blocks_overlap) && t == 0) store(out, unit.at[0]);
}

// A sum that every block adds to, in the order of the blocks that come last: right with a fence before the counter,
// wrong without.
template <bool kHasFence>
__global__ void last_block_kernel(const float* __restrict__ in, int64_t rows, float* __restrict__ out) {
    PREQUANT_SHARED(is_last, bool);
    if (threadIdx.x == 0) {
        float sum = 0;
        for (int64_t i = int64_t(blockIdx.x) * kRows * kRows; i < min(rows, (int64_t(blockIdx.x) + 1) * kRows) * kRows;
             ++i)
            sum += in[i];
        out[1 + blockIdx.x] = sum;
        if (kHasFence) __threadfence();
        is_last = atomicAdd(reinterpret_cast<unsigned*>(out), 1u) == gridDim.x - 1;
    }
    __syncthreads();
    if (!is_last || threadIdx.x != 0) return;
    float sum = 0;
    for (unsigned i = 0; i < gridDim.x; ++i) sum += out[1 + i];
    out[1] = sum;
}

// out[thread of the grid] = how many threads came before it. A launch over r rows has r / 32 blocks of 256 threads.
__global__ void tickets_kernel(const float*, int64_t, float* out) {
    unsigned* next = reinterpret_cast<unsigned*>(out);
    next[1 + blockIdx.x * kThreads + threadIdx.x] = atomicAdd(next, 1u);
}

const struct {
    const char* name;
    void (*kernel)(const float*, int64_t, float*);
} kKernels[] = {
#define PREQUANT_DEFECT(name) {#name, units_kernel<Defect::name>}
    PREQUANT_DEFECT(none),
    PREQUANT_DEFECT(missing_barrier),
    PREQUANT_DEFECT(missing_wait),
    PREQUANT_DEFECT(missing_swizzle),
    PREQUANT_DEFECT(missing_zeros),
    PREQUANT_DEFECT(missing_warp_barrier),
    PREQUANT_DEFECT(strided_stores),
    PREQUANT_DEFECT(reads_past_the_input),
    PREQUANT_DEFECT(writes_past_the_output),
    PREQUANT_DEFECT(writes_to_the_input),
    PREQUANT_DEFECT(copies_past_shared_memory),
    PREQUANT_DEFECT(stores_past_shared_memory),
    PREQUANT_DEFECT(misaligned_load),
    PREQUANT_DEFECT(divergent_barrier),
    PREQUANT_DEFECT(barrier_after_exit),
    PREQUANT_DEFECT(shuffle_after_exit),
    PREQUANT_DEFECT(wrong_mask),
    PREQUANT_DEFECT(different_collectives),
    PREQUANT_DEFECT(deadlock),
    PREQUANT_DEFECT(blocks_overlap),
#undef PREQUANT_DEFECT
    {"tickets", tickets_kernel},
    {"last_block", last_block_kernel<true>},
    {"last_block_without_fence", last_block_kernel<false>},
};

}  // namespace

}  // namespace prequant::cuda

// For ctypes. Returns null, or what went wrong.
extern "C" __attribute__((visibility("default"))) const char* prequant_defect(const char* name, const float* in,
                                                                              int64_t rows, float* out) {
    using namespace prequant::cuda;
    static thread_local std::string error;
    for (const auto& [known, kernel] : kKernels) {
        if (std::strcmp(known, name) != 0) continue;
        try {
            launch(known, kernel,
                   {.grid = dim3(static_cast<unsigned>(prequant::ceil_div(rows, kRows))),
                    .block = dim3(kThreads),
                    .shared_bytes = kThreads * sizeof(Unit)},
                   in, rows, out);
            return nullptr;
        } catch (const std::exception& failure) {
            error = failure.what();
            return error.c_str();
        }
    }
    error = std::string("no kernel is named ") + name;
    return error.c_str();
}
