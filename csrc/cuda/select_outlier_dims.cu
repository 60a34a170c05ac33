// The r dimensions with most outliers, ascending; ties go to the larger energy, then to the lower index.
//                                                                                Meaning: reference.select_outlier_dims
//   rank of i = how many j come before i      1. by importance: dimension i goes to place rank(i) of `best`, if that is
//                                                below r
//                                             2. by index:      best[i] goes to place rank(i) of `dims`
//
//   lane   0  1 ... 31 |  0  1 ... 31 | ...   A warp ranks 8 items at once; its lanes read all items in turn, and add
//                                             their counts at the end.
//
// Requires   items that differ: places are then all taken, each by one.
// Limited by size^2 comparisons, 17 million at 4096 dimensions, and at few of them by its two launches.
#include "cuda.h"
#include "portable.cuh"

namespace prequant::cuda {

namespace {

constexpr int kWarpsPerBlock = 8, kItems = 8;

struct ByImportance {
    const int64_t *counts, *energy;
    struct Item {
        int64_t count, energy, index;
    };
    __device__ __forceinline__ Item at(int64_t i) const { return {counts[i], energy[i], i}; }
    __device__ __forceinline__ static bool comes_before(const Item& a, const Item& b) {
        return a.count != b.count ? a.count > b.count : a.energy != b.energy ? a.energy > b.energy : a.index < b.index;
    }
    __device__ __forceinline__ static int64_t dimension(const Item& item) { return item.index; }
};

struct ByIndex {
    const int64_t* dims;
    using Item = int64_t;
    __device__ __forceinline__ Item at(int64_t i) const { return dims[i]; }
    __device__ __forceinline__ static bool comes_before(Item a, Item b) { return a < b; }
    __device__ __forceinline__ static int64_t dimension(Item item) { return item; }
};

template <typename Order>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock)
    rank_kernel(Order order, int64_t size, int64_t places, int64_t* __restrict__ ranked) {
    const int64_t first = (int64_t(blockIdx.x) * kWarpsPerBlock + threadIdx.y) * kItems;
    const int lane = threadIdx.x;
    if (first >= size) return;
    typename Order::Item items[kItems];
    unsigned before[kItems] = {};
#pragma unroll
    for (int i = 0; i < kItems; ++i) items[i] = order.at(min(first + i, size - 1));
    for (int64_t j = lane; j < size; j += kWarp) {
        const auto other = order.at(j);
#pragma unroll
        for (int i = 0; i < kItems; ++i) before[i] += Order::comes_before(other, items[i]);
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
        int64_t rank = before[i];
#pragma unroll
        for (int width = kWarp / 2; width > 0; width /= 2) rank += __shfl_down_sync(kAllLanes, rank, width);
        if (lane == 0 && first + i < size && rank < places) ranked[rank] = Order::dimension(items[i]);
    }
}

template <typename Order>
void rank(const Order& order, int64_t size, int64_t places, int64_t* ranked, Stream stream) {
    const LaunchConfig config{.grid = dim3(static_cast<unsigned>(ceil_div(size, kWarpsPerBlock * kItems))),
                              .block = dim3(kWarp, kWarpsPerBlock),
                              .stream = stream};
    launch("rank_kernel", rank_kernel<Order>, config, order, size, places, ranked);
}

}  // namespace

void select_outlier_dims(const int64_t* counts, const int64_t* energy, int64_t size, int64_t r, int64_t* dims,
                         Stream stream) {
    if (r == 0) return;
    int64_t* best = static_cast<int64_t*>(stream.scratch(r * static_cast<int64_t>(sizeof(int64_t))));
    rank(ByImportance{counts, energy}, size, r, best, stream);
    rank(ByIndex{best}, r, r, dims, stream);
}

}  // namespace prequant::cuda
