// Mean, population standard deviation, minimum and maximum of each block of consecutive weights.
//                                                                                       Meaning: reference.weight_stats
//   block    tile 0 (4096 elements) | tile 1 | ...        A warp takes a tile through shared memory, so that two passes
//   tile     lane   0  1 ... 31 |  0  1 ... 31 | ...      read it once; a short block is one short tile, and takes no
//                                                         more shared memory than it fills.
//
//   1. weight_stats_kernel    lane l adds its elements in turn, then the upper half of the lanes is added to the lower
//                             half: the mean; the same for the squares of the deviations. One tile: the block's result.
//                             More: the tile's, to scratch.
//   2. merge_tiles_kernel     a warp for each block brings in 32 tiles at a time, the next ones ahead; one lane merges
//                             them (Chan et al.).
//
// Requires   16-byte copies need aligned tiles: an aligned weight, and blocks of whole 16 bytes unless there is one
//            block. Others are copied singly.
// Sums in    float64, each operation rounded by itself and in cpu/weight_stats.h's order: the same bits.
// Limited by one read of the weight where float64 runs at a half of float32's rate, by 6 float64 operations an element
//            elsewhere. The merge is a chain of 3 float64 operations a tile: 4096 x 4096 waits for 12 thousand of them
//            in a row, 2^31 elements for 1.6 million, which at 8 cycles each is 0.07 ms and 9 ms at 1.4 GHz, or twice
//            the read of a float32 matrix (reckoned, not measured).
#include <cmath>

#include "cuda.h"
#include "portable.cuh"
#include "ptx.cuh"

namespace prequant::cuda {

namespace {

struct TileStats {
    double mean, squares;  // squares: sum of (w - mean)^2
    float minimum, maximum;
};

// What merging `size` more elements into `count` needs of the two numbers; they are known ahead of the tile.
struct Share {
    double share, weight;
};

struct BlockStats {
    double *mean, *std, *minimum, *maximum;
};

__device__ __forceinline__ int tile_size(int64_t block_size, int64_t t) {
    const int64_t left = block_size - t * kStatsTile;
    return static_cast<int>(left < kStatsTile ? left : kStatsTile);
}

__device__ __forceinline__ Share share_of_tile(int64_t block_size, int64_t t) {
    const double count = static_cast<double>(t * kStatsTile), size = tile_size(block_size, t);
    const double share = __ddiv_rn(size, __dadd_rn(count, size));
    return {share, __dmul_rn(count, share)};
}

// The statistics of the tiles merged so far; the first one finds mean and squares 0, and its own range.
struct MergedStats {
    double mean, squares;
    float minimum, maximum;

    __device__ __forceinline__ void merge(const TileStats& tile, Share s) {
        const double delta = __dsub_rn(tile.mean, mean);
        mean = __dadd_rn(mean, __dmul_rn(delta, s.share));
        squares = __dadd_rn(squares, __dadd_rn(tile.squares, __dmul_rn(__dmul_rn(delta, delta), s.weight)));
        minimum = tile.minimum != tile.minimum || tile.minimum < minimum ? tile.minimum : minimum;
        maximum = tile.maximum != tile.maximum || tile.maximum > maximum ? tile.maximum : maximum;
    }

    __device__ __forceinline__ void write(const BlockStats& to, int64_t block, int64_t block_size) const {
        to.mean[block] = mean;
        to.std[block] = __dsqrt_rn(__ddiv_rn(squares, static_cast<double>(block_size)));
        to.minimum[block] = minimum;
        to.maximum[block] = maximum;
    }
};

// Lane 0 gets (0 + 16) + (8 + 24) ...: the upper half added to the lower half until one is left.
__device__ __forceinline__ double fold_lanes(double sum) {
#pragma unroll
    for (int width = kWarp / 2; width > 0; width /= 2) sum = __dadd_rn(sum, __shfl_down_sync(kAllLanes, sum, width));
    return sum;
}

// All lanes call; lane 0 gets the result.
template <typename T>
__device__ __forceinline__ TileStats tile_stats(const T* tile, int size, int lane) {
    double sum = 0;
    float lowest = to_float(tile[0]), highest = lowest;
    bool is_poisoned = lowest != lowest;
#pragma unroll 8
    for (int i = lane; i < size; i += kWarp) {
        const float value = to_float(tile[i]);
        sum = __dadd_rn(sum, static_cast<double>(value));
        lowest = value < lowest ? value : lowest;
        highest = value > highest ? value : highest;
        is_poisoned |= value != value;
    }
    // Neighbours first: of two zeros the lower lane's stays, as in the CPU's order.
#pragma unroll
    for (int width = 1; width < kWarp; width *= 2) {
        const float low = __shfl_down_sync(kAllLanes, lowest, width),
                    high = __shfl_down_sync(kAllLanes, highest, width);
        lowest = low < lowest ? low : lowest;
        highest = high > highest ? high : highest;
    }
    if (__any_sync(kAllLanes, is_poisoned)) lowest = highest = NAN;
    const double mean = __ddiv_rn(__shfl_sync(kAllLanes, fold_lanes(sum), 0), static_cast<double>(size));

    double squares = 0;
#pragma unroll 8
    for (int i = lane; i < size; i += kWarp) {
        const double deviation = __dsub_rn(static_cast<double>(to_float(tile[i])), mean);
        squares = __dadd_rn(squares, __dmul_rn(deviation, deviation));
    }
    return {mean, fold_lanes(squares), lowest, highest};
}

template <typename T, bool kWide>
__global__ void weight_stats_kernel(const T* __restrict__ weight, int64_t block_size, int64_t blocks, int64_t tiles,
                                    int slot_size, TileStats* __restrict__ of_tiles, BlockStats of_blocks) {
    constexpr int kVector = kVectorBytes / sizeof(T);
    const int lane = threadIdx.x;
    T* slot = dynamic_shared<T>() + threadIdx.y * slot_size;
    for (int64_t item = int64_t(blockIdx.x) * blockDim.y + threadIdx.y; item < blocks * tiles;
         item += int64_t(gridDim.x) * blockDim.y) {
        const int64_t block = tiles == 1 ? item : item / tiles, t = tiles == 1 ? 0 : item % tiles;
        const T* tile = weight + block * block_size + t * kStatsTile;
        const int size = tile_size(block_size, t), copied = kWide ? size / kVector * kVector : 0;
        for (int i = lane * kVector; i < copied; i += kWarp * kVector) cp_async_16_evict_first(slot + i, tile + i);
        for (int i = copied + lane; i < size; i += kWarp) slot[i] = tile[i];
        cp_async_commit();
        cp_async_wait<0>();
        __syncwarp();

        const TileStats stats = tile_stats(slot, size, lane);
        if (lane == 0) {
            if (tiles == 1) {
                MergedStats merged{0, 0, stats.minimum, stats.maximum};
                merged.merge(stats, {1, 0});
                merged.write(of_blocks, block, block_size);
            } else {
                of_tiles[item] = stats;
            }
        }
        __syncwarp();  // the slot is free again
    }
}

struct Wave {  // the tiles that are merged next
    TileStats tiles[kWarp];
    Share shares[kWarp];
};

__global__ void __launch_bounds__(kWarp) merge_tiles_kernel(const TileStats* __restrict__ of_tiles, int64_t block_size,
                                                            int64_t tiles, BlockStats of_blocks) {
    PREQUANT_SHARED(wave, Wave);
    const int64_t block = blockIdx.x;
    const int lane = threadIdx.x;
    of_tiles += block * tiles;
    TileStats ahead = of_tiles[lane < tiles ? lane : 0];
    MergedStats merged{0, 0, of_tiles[0].minimum, of_tiles[0].maximum};
    for (int64_t first = 0; first < tiles; first += kWarp) {
        const int count = static_cast<int>(tiles - first < kWarp ? tiles - first : kWarp);
        wave.tiles[lane] = ahead;
        if (lane < count) wave.shares[lane] = share_of_tile(block_size, first + lane);
        __syncwarp();
        if (const int64_t next = first + kWarp + lane; next < tiles) ahead = of_tiles[next];
        if (lane == 0) {
#pragma unroll 4
            for (int i = 0; i < count; ++i) merged.merge(wave.tiles[i], wave.shares[i]);
        }
        __syncwarp();
    }
    if (lane == 0) merged.write(of_blocks, block, block_size);
}

template <typename T>
void weight_stats_of(const T* weight, int64_t elements, int64_t block_size, const BlockStats& of_blocks,
                     Stream stream) {
    constexpr int64_t kVector = kVectorBytes / sizeof(T), kSharedBytes = 32 * 1024, kMaxWarps = 8,
                      kMaxGrid = 2147483647;
    const int64_t blocks = elements / block_size, tiles = ceil_div(block_size, kStatsTile), items = blocks * tiles;
    const int64_t slot_size = ceil_div(std::min(block_size, kStatsTile), kVector) * kVector,
                  slot_bytes = slot_size * static_cast<int64_t>(sizeof(T));
    const int64_t warps = std::min({kSharedBytes / slot_bytes, kMaxWarps, items});
    const bool is_wide = is_aligned(weight, kVectorBytes) && (blocks == 1 || block_size % kVector == 0);
    TileStats* of_tiles =
        tiles == 1 ? nullptr : static_cast<TileStats*>(stream.scratch(items * static_cast<int64_t>(sizeof(TileStats))));

    const LaunchConfig config{.grid = dim3(static_cast<unsigned>(std::min(ceil_div(items, warps), kMaxGrid))),
                              .block = dim3(kWarp, static_cast<unsigned>(warps)),
                              .stream = stream,
                              .shared_bytes = static_cast<size_t>(warps * slot_bytes)};
    launch("weight_stats_kernel", is_wide ? weight_stats_kernel<T, true> : weight_stats_kernel<T, false>, config,
           weight, block_size, blocks, tiles, static_cast<int>(slot_size), of_tiles, of_blocks);
    if (tiles == 1) return;
    launch("merge_tiles_kernel", merge_tiles_kernel,
           {.grid = dim3(static_cast<unsigned>(blocks)), .block = dim3(kWarp), .stream = stream}, of_tiles, block_size,
           tiles, of_blocks);
}

}  // namespace

void weight_stats(Matrix weight, int64_t block_size, double* mean, double* std, double* minimum, double* maximum,
                  Stream stream) {
    const int64_t elements = weight.rows * weight.cols;
    if (elements == 0) return;
    const BlockStats of_blocks{mean, std, minimum, maximum};
    switch (weight.dtype) {
        case Dtype::float32:
            return weight_stats_of(static_cast<const float*>(weight.data), elements, block_size, of_blocks, stream);
        case Dtype::float16:
            return weight_stats_of(static_cast<const __half*>(weight.data), elements, block_size, of_blocks, stream);
        case Dtype::bfloat16:
            return weight_stats_of(static_cast<const __nv_bfloat16*>(weight.data), elements, block_size, of_blocks,
                                   stream);
    }
}

}  // namespace prequant::cuda
