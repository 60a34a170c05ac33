// lo = min(min x, 0), hi = max(max x, 0), scale = hi/256 - lo/256, zero_point = clip(rint(-lo * (1/scale)), 0, 255)
// codes = clip(rint(x * (1/scale)) + zero_point, 0, 255), sums[m, g] = sum of the codes of group g
//                                                                              Meaning: reference.quantize_activations
//   row m      0..7 | 8..15 | ... | 248..255 | 256.. |    A row belongs to 32, 128 or 512 threads, whichever hold it in
//   thread      0   |   1   | ... |    31    |   0   |    registers: 4 vectors of 128 bits each (fp16 drawn), or 16
//                                                         single values. A row longer than 512 threads hold (16384
//                                                         halves, 8192 floats or singles) is cut into such tiles and
//                                                         read twice.
//
//   per token   ranges and codes in one launch: x is read once.
//   per tensor  1. the range of each row, to scratch   2. one block: the range of all, scale and zero point
//               3. codes: x is read twice.
//
// Requires   128-bit loads need K a multiple of their values and aligned pointers; otherwise a thread loads one value
//            at a time. Excluded columns that are out of range are skipped.
// Rounds     each operation once, in float32, without contraction: bit for bit the reference. Ranges and integer sums
//            have no order.
// Limited by reading x and writing the codes.
#include <numeric>

#include "cuda.h"
#include "portable.cuh"

namespace prequant::cuda {

namespace {

constexpr int kBlockThreads = 256, kMaxWarps = 16;
// Of a row, in the registers of one thread: 4 vectors, or 16 values.
constexpr int kThreadBytes = 64, kThreadSingles = 16;

constexpr int block_threads(int row_threads) { return row_threads == kWarp ? kBlockThreads : row_threads; }

enum class Pass { token, range, encode };

struct Range {
    float low, high;  // of the values and 0
    float poison;  // 0 where all values are finite, else NaN
};

struct Coding {
    float scale, inverse;
    int zero_point;
    bool is_finite;
};

struct Task {  // what all kernels of a call share
    int64_t M;
    int K, G, group_size;
    const int64_t* excluded;
    int64_t excluded_size;
    uint8_t* codes;
    float* scale;
    uint8_t* zero_point;
    int32_t* sums;
    Range* ranges;  // of the rows, between the passes
    Pass pass;
    int sum_lanes;  // so many neighbouring lanes always have vectors of one group; 0: a vector may straddle groups
};

__device__ inline Range merge(const Range& a, const Range& b) {
    return {fminf(a.low, b.low), fmaxf(a.high, b.high), a.poison + b.poison};
}

__device__ inline Range merge_lanes(Range range) {
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2)
        range = merge(range, {__shfl_xor_sync(kAllLanes, range.low, step), __shfl_xor_sync(kAllLanes, range.high, step),
                              __shfl_xor_sync(kAllLanes, range.poison, step)});
    return range;
}

__device__ inline int32_t sum_lanes(int32_t sum, int lanes) {
    for (int step = lanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
    return sum;
}

// The coding that belongs to a stored scale and zero point: NaN marks values that are not finite.
__device__ inline Coding stored_coding(float scale, int zero_point) {
    const bool is_finite = scale == scale;
    return {scale, is_finite ? __frcp_rn(scale) : 0.0f, zero_point, is_finite};
}

__device__ inline Coding coding_of(const Range& range) {
    if (!(range.poison == 0)) return stored_coding(__uint_as_float(kNanBits), 0);
    const float scale = __fsub_rn(__fmul_rn(range.high, 0x1p-8f), __fmul_rn(range.low, 0x1p-8f));
    if (scale < kMinScale) return stored_coding(1, 0);  // every value is below 2^-117, so that all codes are 0
    const float zero_point = rintf(__fmul_rn(-range.low, __frcp_rn(scale)));
    return stored_coding(scale, static_cast<int>(fminf(zero_point, 255)));
}

// A thread's share of a tile of a row: vectors thread, thread + kThreads, ...
template <typename T, int kValues, int kThreads>
struct Tile {
    static constexpr int kVectors = kValues == 1 ? kThreadSingles : kThreadBytes / kVectorBytes,
                         kColumns = kVectors * kValues * kThreads;
    Vector<T, kValues> vectors[kVectors];

    static __device__ int column(int begin, int thread, int i) { return begin + (i * kThreads + thread) * kValues; }

    __device__ void clear() {
#pragma unroll
        for (int i = 0; i < kVectors * kValues; ++i) vectors[i / kValues].at[i % kValues] = from_float<T>(0);
    }

    // Excluded values, and those past the row's end, become 0, which is inside every range.
    __device__ void load_row(const T* row, const Task& task, int begin, int thread) {
        clear();
#pragma unroll
        for (int i = 0; i < kVectors; ++i)
            if (column(begin, thread, i) < task.K)
                vectors[i] = load<Vector<T, kValues>>(row + column(begin, thread, i));
        if (task.excluded_size == 0) return;
        uint32_t is_excluded = 0;  // bit i * kValues + j: value j of vector i
#pragma unroll 1
        for (int64_t e = 0; e < task.excluded_size; ++e) {
            const int64_t at = task.excluded[e] - begin;
            if (at < 0 || at >= kColumns) continue;
            const int offset = static_cast<int>(at), vector = offset / kValues;
            if (vector % kThreads == thread) is_excluded |= 1u << (vector / kThreads * kValues + offset % kValues);
        }
#pragma unroll
        for (int i = 0; i < kVectors * kValues; ++i)
            if (is_excluded >> i & 1) vectors[i / kValues].at[i % kValues] = from_float<T>(0);
    }

    __device__ Range range() const {
        Range result{0, 0, 0};
#pragma unroll
        for (int i = 0; i < kVectors * kValues; ++i) {
            const float x = to_float(vectors[i / kValues].at[i % kValues]);
            result = {fminf(result.low, x), fmaxf(result.high, x), __fmaf_rn(x, 0, result.poison)};
        }
        return result;
    }
};

// |x * inverse| is at most 256: adding kRounder rounds it half to even and leaves the integer in the lowest bits.
__device__ inline int code_of(float x, const Coding& coding) {
    const int rounded = __float_as_int(__fadd_rn(__fmul_rn(x, coding.inverse), kRounder)) - __float_as_int(kRounder);
    return min(max(rounded + coding.zero_point, 0), 255);
}

// Adds a vector's codes to the sums of their groups: where neighbouring lanes share a group, their sum at once.
template <int kValues>
__device__ void add_to_groups(const Vector<uint8_t, kValues>& codes, int32_t vector_sum, const Task& task, int64_t m,
                              int k, int thread) {
    vector_sum = sum_lanes(vector_sum, task.sum_lanes);
    if (k >= task.K) return;
    const int group = k / task.group_size;
    int32_t* to = task.sums + m * task.G + group;
    if (kValues == 1 || task.sum_lanes > 0) {
        if (thread % task.sum_lanes == 0) atomicAdd(to, vector_sum);
        return;
    }
    int left = (group + 1) * task.group_size - k;  // of the group
#pragma unroll
    for (int j = 0; j < kValues; ++j) {
        atomicAdd(to, static_cast<int32_t>(codes.at[j]));
        if (--left == 0) ++to, left = task.group_size;
    }
}

// Writes the codes of a tile; returns the sum of the thread's own, or adds them to their groups' sums where there are
// several.
template <typename T, int kValues, int kThreads>
__device__ int32_t encode(Tile<T, kValues, kThreads>& tile, const Coding& coding, const Task& task, int64_t m,
                          int begin, int thread) {
    if (!coding.is_finite) tile.clear();  // codes 0
    int32_t sum = 0;
#pragma unroll
    for (int i = 0; i < tile.kVectors; ++i) {
        const int k = tile.column(begin, thread, i);
        if (k - thread * kValues >= task.K) break;  // the same for the whole row: no lane misses the shuffles
        Vector<uint8_t, kValues> codes;
        int32_t vector_sum = 0;
#pragma unroll
        for (int j = 0; j < kValues; ++j) {
            const int code = code_of(to_float(tile.vectors[i].at[j]), coding);
            codes.at[j] = static_cast<uint8_t>(code);
            vector_sum += code;
        }
        const bool is_inside = k < task.K;
        if (is_inside)
            store(task.codes + m * task.K + k, codes);
        else
            vector_sum = 0;
        if (task.G == 1) {
            sum += vector_sum;
        } else {
            add_to_groups<kValues>(codes, vector_sum, task, m, k, thread);
        }
    }
    return sum;
}

// 768 threads a multiprocessor, or one block of 512: room for 80 registers, so that nothing is spilled.
template <typename T, int kValues, int kThreads>
__global__ void __launch_bounds__(block_threads(kThreads), 768 / block_threads(kThreads))
    quantize_activations_kernel(const T* __restrict__ x, Task task) {
    constexpr int kRowWarps = kThreads / kWarp;
    using RowTile = Tile<T, kValues, kThreads>;
    const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
    const auto sync_row = [] {
        if constexpr (kRowWarps == 1)
            __syncwarp();
        else
            __syncthreads();
    };
    const int64_t m = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
    if (m >= task.M) return;  // with several warps a row, the block has one row
    const T* row = x + m * task.K;

    RowTile tile;
    Coding coding;
    if (task.pass == Pass::encode) {
        coding = stored_coding(*task.scale, *task.zero_point);
    } else {
        Range range{0, 0, 0};
#pragma unroll 1
        for (int begin = 0; begin < task.K; begin += RowTile::kColumns) {
            tile.load_row(row, task, begin, thread);
            range = merge(range, tile.range());
        }
        range = merge_lanes(range);
        if constexpr (kRowWarps > 1) {
            PREQUANT_SHARED(warp_ranges, Range[kRowWarps]);
            if (lane == 0) warp_ranges[warp] = range;
            __syncthreads();
            range = merge_lanes(warp_ranges[lane % kRowWarps]);
        }
        if (task.pass == Pass::range) {
            if (thread == 0) task.ranges[m] = range;
            return;
        }
        coding = coding_of(range);
        if (thread == 0) {
            task.scale[m] = coding.scale;
            task.zero_point[m] = static_cast<uint8_t>(coding.zero_point);
        }
    }

    if (task.G > 1) {
#pragma unroll 1
        for (int g = thread; g < task.G; g += kThreads) task.sums[m * task.G + g] = 0;
        sync_row();
    }
    int32_t sum = 0;
#pragma unroll 1
    for (int begin = 0; begin < task.K; begin += RowTile::kColumns) {
        if (task.pass == Pass::encode || task.K > RowTile::kColumns) tile.load_row(row, task, begin, thread);
        sum += encode(tile, coding, task, m, begin, thread);
    }
    if (task.G != 1) return;
    sum = sum_lanes(sum, kWarp);
    if constexpr (kRowWarps > 1) {
        PREQUANT_SHARED(warp_sums, int32_t[kRowWarps]);
        if (lane == 0) warp_sums[warp] = sum;
        __syncthreads();
        sum = sum_lanes(warp_sums[lane % kRowWarps], kRowWarps);
    }
    if (thread == 0) task.sums[m] = sum;
}

// One block: the range of all rows, their scale and zero point.
__global__ void __launch_bounds__(kMaxWarps* kWarp) tensor_coding_kernel(Task task) {
    PREQUANT_SHARED(warp_ranges, Range[kMaxWarps]);
    const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp;
    Range range{0, 0, 0};
    for (int64_t m = thread; m < task.M; m += kMaxWarps * kWarp) range = merge(range, task.ranges[m]);
    range = merge_lanes(range);
    if (lane == 0) warp_ranges[thread / kWarp] = range;
    __syncthreads();
    range = merge_lanes(warp_ranges[lane % kMaxWarps]);
    if (thread == 0) {
        const Coding coding = coding_of(range);
        *task.scale = coding.scale;
        *task.zero_point = static_cast<uint8_t>(coding.zero_point);
    }
}

template <typename T, int kValues, int kThreads>
void launch_rows(const void* x, Task task, Stream stream) {
    constexpr int kRows = block_threads(kThreads) / kThreads;
    if (ceil_div(task.M, kRows) > kMaxGridX)
        throw std::runtime_error("a CUDA launch covers at most " + std::to_string(kMaxGridX * kRows) + " rows, got " +
                                 std::to_string(task.M));
    if (task.group_size % kValues == 0) task.sum_lanes = std::gcd(task.group_size / kValues, kWarp);
    launch("quantize_activations_kernel", quantize_activations_kernel<T, kValues, kThreads>,
           {.grid = dim3(static_cast<unsigned>(ceil_div(task.M, kRows))),
            .block = dim3(kThreads, kRows),
            .stream = stream},
           static_cast<const T*>(x), task);
}

template <typename T>
void launch_pass(const void* x, const Task& task, Stream stream) {
    constexpr int kValues = kVectorBytes / sizeof(T);
    if (task.M == 0) return;
    if (task.K % kValues != 0 || !is_aligned(x, kVectorBytes) || !is_aligned(task.codes, kValues))
        return task.K <= Tile<T, 1, 32>::kColumns ? launch_rows<T, 1, 32>(x, task, stream)
                                                  : launch_rows<T, 1, 512>(x, task, stream);
    if (task.K <= Tile<T, kValues, 32>::kColumns) return launch_rows<T, kValues, 32>(x, task, stream);
    if (task.K <= Tile<T, kValues, 128>::kColumns) return launch_rows<T, kValues, 128>(x, task, stream);
    return launch_rows<T, kValues, 512>(x, task, stream);
}

void launch_pass(const Matrix& x, Task task, Pass pass, Stream stream) {
    task.pass = pass;
    switch (x.dtype) {
        case Dtype::float32: return launch_pass<float>(x.data, task, stream);
        case Dtype::float16: return launch_pass<__half>(x.data, task, stream);
        case Dtype::bfloat16: return launch_pass<__nv_bfloat16>(x.data, task, stream);
    }
}

}  // namespace

void quantize_activations(Matrix x, bool per_token, int64_t G, const int64_t* excluded, int64_t size, uint8_t* codes,
                          float* scale, uint8_t* zero_point, int32_t* sums, Stream stream) {
    // Columns are counted in 32 bits, up to a tile past the end.
    constexpr int64_t kMaxColumns = INT32_MAX - kThreadBytes * 512;
    if (x.cols > kMaxColumns)
        throw std::runtime_error("quantize_activations: a GPU takes rows of at most " + std::to_string(kMaxColumns) +
                                 " values, got " + std::to_string(x.cols));
    const int K = static_cast<int>(x.cols), groups = static_cast<int>(G);
    Task task{x.rows,  K,           groups, groups > 0 ? K / groups : 0, excluded, size, codes, scale, zero_point, sums,
              nullptr, Pass::token, 0};
    if (per_token) return launch_pass(x, task, Pass::token, stream);
    task.ranges = static_cast<Range*>(stream.scratch(x.rows * static_cast<int64_t>(sizeof(Range))));
    launch_pass(x, task, Pass::range, stream);
    launch("tensor_coding_kernel", tensor_coding_kernel,
           {.grid = dim3(1), .block = dim3(kMaxWarps * kWarp), .stream = stream}, task);
    launch_pass(x, task, Pass::encode, stream);
}

}  // namespace prequant::cuda
