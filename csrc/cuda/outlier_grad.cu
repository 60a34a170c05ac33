// axis 1: gradient[n, j] = sum over m of grad_y[m, n] x[m, j]           (N, r), x (M, r) the outlier columns
// axis 0: gradient[j, k] = sum over m of grad_y[m, dims[j]] x[m, k]     (r, K)          Meaning: reference.outlier_grad
//
//   Both are narrow^T wide: narrow (M, r) is x or the gathered columns of grad_y, wide (M, columns) is grad_y or x.
//
//                   columns of wide            A block makes kTile outliers x 32 lanes' columns (4 floats, 8 halves or
//          lane       0    1   ...   31        8 codes a lane) of one part of M. Its warps take the rows in turn,
//   row  0 warp 0   |----|----|...|----|       and meet in shared memory at the end. narrow, gathered and in float32,
//        1      1   |----|----|...|----|       waits in shared memory 128 rows at a time.
//        8      0   |----|----|...|----|
//
//   Codes: the token's scale multiplies narrow once instead of every code; the zero point is subtracted from the code,
//   exactly.
//
// Requires   128-bit loads (64-bit ones of codes) need a whole number of them in a row and an aligned pointer;
//            otherwise lanes take columns 32 apart, one at a time. dims out of range give zeros.
// Sums in    float32: a warp's rows in turn, then the 8 warps in turn, then the parts of M in turn.
// Limited by one read of wide for every 8 outliers (5 where that makes as few), and r columns of grad_y (axis 0) in
//            sectors of 32 bytes.
#include "cuda.h"
#include "outliers.cuh"

namespace prequant::cuda {

namespace {

constexpr int kWarps = 8, kThreads = kWarp * kWarps;
constexpr int kStageRows = 128;  // rows of narrow in shared memory

// What both axes are, as one product.
struct Product {
    Source narrow;  // axis 1: x;  axis 0: grad_y, of which dims names the columns
    const int64_t* dims;  // null for axis 1
    Activations codes;  // of wide
    int64_t M, columns, r, rows;  // rows: of one part of M
    int column_tiles, outlier_tiles;
    int64_t row_stride, column_stride;  // of the gradient, from outlier to outlier and from column to column
};

// Columns of a tile and where their sums wait for the other warps. A lane stores its columns 4 at a time, a thread then
// reads one column; both meet 32 different banks because each run of 32 lanes begins kPad banks after the one before.
template <typename Wide, bool kWide>
struct Tile {
    // 16 codes a lane would leave no registers for their sums.
    static constexpr int kPerLane = sizeof(Wide) == 4 ? 4 : 8, kColumns = kWarp * kPerLane;
    static constexpr int kBatch = 4;  // rows that a warp has in flight
    static_assert(kColumns <= kThreads && kStageRows % (kBatch * kWarps) == 0);
    static constexpr int kQuads = kPerLane / 4, kPad = kWide && kQuads > 1 ? 4 * kWarp / kPerLane : 0;
    static constexpr int kPitch = kQuads * (4 * kWarp + kPad);
    // As words: numbers of 16 bits would be taken apart and put together again.
    using Words = Vector<uint32_t, kPerLane * sizeof(Wide) / 4>;

    static PREQUANT_HOST_DEVICE constexpr int column(int lane, int i) {
        return kWide ? lane * kPerLane + i : i * kWarp + lane;
    }
    static PREQUANT_HOST_DEVICE constexpr int position(int column) {
        return kWide ? column % kPerLane / 4 * (4 * kWarp + kPad) + column / kPerLane * 4 + column % 4 : column;
    }
};

// narrow[row, first_outlier + j] for the rows of one stage, then for codes their zero point as biased_code has it. Rows
// past the end: 0.
template <int kTile, int kSlots, bool kHasCodes>
__device__ __forceinline__ void fetch_narrow(const Product& product, int64_t first_row, int64_t end_row,
                                             int64_t first_outlier, float* stage) {
    for (int e = static_cast<int>(threadIdx.x); e < kStageRows * kSlots; e += kThreads) {
        const int j = e % kSlots;
        const int64_t m = first_row + e / kSlots, outlier = first_outlier + j, token = product.codes.per_token ? m : 0;
        float value = 0;
        if (m < end_row && j < kTile && outlier < product.r) {
            const int64_t column = product.dims == nullptr ? outlier : product.dims[outlier];
            if (column >= 0 && column < product.narrow.cols()) value = value_at(product.narrow, m, column);
            if (kHasCodes) value *= product.codes.scale[token];
        } else if (kHasCodes && j == kTile) {
            value = kCodeBias + (m < end_row ? static_cast<float>(product.codes.zero_point[token]) : 0);
        }
        stage[e] = value;
    }
}

template <typename Wide, bool kWide>
__device__ __forceinline__ typename Tile<Wide, kWide>::Words fetch_wide(const Wide* row, int64_t first_column, int lane,
                                                                        int64_t columns) {
    using T = Tile<Wide, kWide>;
    typename T::Words words{};
    if constexpr (kWide) {
        if (first_column + lane * T::kPerLane < columns)
            words = load<typename T::Words>(row + first_column + lane * T::kPerLane);
    } else {
        Wide numbers[T::kPerLane]{};
#pragma unroll
        for (int i = 0; i < T::kPerLane; ++i) {
            const int64_t column = first_column + T::column(lane, i);
            if (column < columns) numbers[i] = row[column];
        }
        memcpy(words.at, numbers, sizeof words);
    }
    return words;
}

template <typename Wide, int kWords>
__device__ __forceinline__ float number(const Vector<uint32_t, kWords>& words, int i, float bias) {
    if constexpr (sizeof(Wide) == 1) {
        return biased_code(words.at[i / 4], i % 4) - bias;
    } else {
        Wide numbers[kWords * 4 / sizeof(Wide)];
        memcpy(numbers, words.at, sizeof numbers);
        return to_float(numbers[i]);
    }
}

// The dynamic shared memory of a block: narrow's rows, a multiple of 4 numbers each, then the sums of the warps or the
// turned tile.
template <typename Wide, int kTile, bool kWide>
struct Shared {
    using T = Tile<Wide, kWide>;
    static constexpr bool kHasCodes = sizeof(Wide) == 1;
    static constexpr int kSlots = (kTile + kHasCodes + 3) / 4 * 4, kPitch = kTile | 1;
    static constexpr int kStage = kStageRows * kSlots, kSums = kWarps * T::kPitch,
                         kTurned = kHasCodes ? 0 : T::kColumns * kPitch;
    static constexpr int kBytes = (kStage + (kSums > kTurned ? kSums : kTurned)) * static_cast<int>(sizeof(float));
};

// Two blocks a processor: one alone has too few loads in flight.
template <typename Wide, int kTile, bool kWide>
__global__ void __launch_bounds__(kThreads, 2)
    outlier_grad_kernel(const Wide* __restrict__ wide, Product product, float* __restrict__ gradient) {
    using S = Shared<Wide, kTile, kWide>;
    using T = typename S::T;
    constexpr bool kHasCodes = S::kHasCodes;
    constexpr int kSlots = S::kSlots, kPitch = S::kPitch;
    float* const stage = dynamic_shared<float>();
    float* const waiting = stage + S::kStage;
    const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
    const int64_t outlier_tile = blockIdx.x % product.outlier_tiles, rest = blockIdx.x / product.outlier_tiles;
    const int64_t first_outlier = outlier_tile * kTile, first_column = rest % product.column_tiles * T::kColumns,
                  part = rest / product.column_tiles;
    const int64_t first_row = part * product.rows,
                  end_row = first_row + product.rows < product.M ? first_row + product.rows : product.M;

    float total[kTile][T::kPerLane] = {};
    for (int64_t stage_row = first_row; stage_row < end_row; stage_row += kStageRows) {
        __syncthreads();
        fetch_narrow<kTile, kSlots, kHasCodes>(product, stage_row, end_row, first_outlier, stage);
        __syncthreads();
        const int rows = static_cast<int>(end_row - stage_row < kStageRows ? end_row - stage_row : kStageRows);
        for (int first = warp; first < rows; first += T::kBatch * kWarps) {
            typename T::Words fetched[T::kBatch];
#pragma unroll
            for (int b = 0; b < T::kBatch; ++b) {
                const int row = first + b * kWarps;
                fetched[b] = row < rows ? fetch_wide<Wide, kWide>(wide + (stage_row + row) * product.columns,
                                                                  first_column, lane, product.columns)
                                        : typename T::Words{};
            }
#pragma unroll
            for (int b = 0; b < T::kBatch; ++b) {
                const int row = first + b * kWarps;  // past the end: narrow is 0, and so are the words
                float slots[kSlots];
#pragma unroll
                for (int q = 0; q < kSlots / 4; ++q) {
                    const auto quad = load<Vector<float, 4>>(stage + row * kSlots + 4 * q);
#pragma unroll
                    for (int i = 0; i < 4; ++i) slots[4 * q + i] = quad.at[i];
                }
#pragma unroll
                for (int i = 0; i < T::kPerLane; ++i) {
                    const float value = number<Wide>(fetched[b], i, kHasCodes ? slots[kTile < kSlots ? kTile : 0] : 0);
#pragma unroll
                    for (int j = 0; j < kTile; ++j) total[j][i] = __fmaf_rn(slots[j], value, total[j][i]);
                }
            }
        }
    }

    // Each thread ends with whole columns; where the gradient's rows are columns of wide, they go out through shared
    // memory, so that neighbouring threads write neighbouring numbers.
    const int count = static_cast<int>(product.r - first_outlier < kTile ? product.r - first_outlier : kTile);
    float* const to = gradient + part * product.r * product.columns;
    const bool is_mine = thread < T::kColumns, is_inside = is_mine && first_column + thread < product.columns;
    float mine[kTile];
#pragma unroll
    for (int j = 0; j < kTile; ++j) {
        __syncthreads();
        if constexpr (kWide) {
#pragma unroll
            for (int q = 0; q < T::kQuads; ++q) {
                const Vector<float, 4> quad{
                    {total[j][4 * q], total[j][4 * q + 1], total[j][4 * q + 2], total[j][4 * q + 3]}};
                store(waiting + warp * T::kPitch + T::position(T::column(lane, 4 * q)), quad);
            }
        } else {
#pragma unroll
            for (int i = 0; i < T::kPerLane; ++i)
                waiting[warp * T::kPitch + T::position(T::column(lane, i))] = total[j][i];
        }
        __syncthreads();
        mine[j] = 0;
        if (is_mine)
#pragma unroll
            for (int w = 0; w < kWarps; ++w) mine[j] += waiting[w * T::kPitch + T::position(thread)];
        if (product.column_stride == 1 && is_inside && j < count)
            to[(first_outlier + j) * product.row_stride + first_column + thread] = mine[j];
    }
    if constexpr (!kHasCodes) {
        if (product.column_stride == 1) return;
        __syncthreads();
        if (is_mine)
#pragma unroll
            for (int j = 0; j < kTile; ++j) waiting[thread * kPitch + j] = mine[j];
        __syncthreads();
        for (int e = thread; e < T::kColumns * count; e += kThreads) {
            const int column = e / count, j = e - column * count;
            if (first_column + column < product.columns)
                to[(first_column + column) * product.column_stride + first_outlier + j] = waiting[column * kPitch + j];
        }
    }
}

template <typename Wide>
struct Choice {
    void (*kernel)(const Wide*, Product, float*);
    size_t shared_bytes;
};

template <typename Wide, int kTile, bool kWide>
Choice<Wide> choice() {
    return {outlier_grad_kernel<Wide, kTile, kWide>, Shared<Wide, kTile, kWide>::kBytes};
}

template <typename Wide>
void outlier_grad_of(const Wide* wide, Product product, float* gradient, Stream stream) {
    constexpr int kSmallTile = 5;  // what the paper trains
    constexpr int kLargeTile = 8;
    constexpr int64_t kBlocks = 512;  // enough for every processor of a large GPU
    const int64_t M = product.M, large_tiles = ceil_div(product.r, kLargeTile);
    const bool is_small = ceil_div(product.r, kSmallTile) == large_tiles;
    const bool is_wide =
        product.columns % Tile<Wide, true>::kPerLane == 0 && is_aligned(wide, sizeof(typename Tile<Wide, true>::Words));
    product.outlier_tiles = static_cast<int>(large_tiles);
    product.column_tiles = static_cast<int>(ceil_div(product.columns, Tile<Wide, true>::kColumns));

    const int64_t tiles = int64_t(product.outlier_tiles) * product.column_tiles;
    const int64_t wanted = std::min(ceil_div(M, kStageRows), ceil_div(kBlocks, tiles));
    product.rows = std::max<int64_t>(1, ceil_div(ceil_div(M, std::max<int64_t>(1, wanted)), kStageRows)) * kStageRows;
    const int64_t parts = std::max<int64_t>(1, ceil_div(M, product.rows)), size = product.r * product.columns;

    const Choice<Wide> chosen = is_small
                                    ? (is_wide ? choice<Wide, kSmallTile, true>() : choice<Wide, kSmallTile, false>())
                                    : (is_wide ? choice<Wide, kLargeTile, true>() : choice<Wide, kLargeTile, false>());
    LaunchConfig config{.grid = grid_of("outlier_grad", tiles * parts), .block = dim3(kThreads), .stream = stream};
    config.shared_bytes = chosen.shared_bytes;
    float* const to =
        parts == 1 ? gradient : static_cast<float*>(stream.scratch(parts * size * static_cast<int64_t>(sizeof(float))));
    launch("outlier_grad_kernel", chosen.kernel, config, wide, product, to);
    if (parts > 1)
        finish(to, static_cast<int>(parts), Source{}, Outliers{nullptr, nullptr, 0, 1}, nullptr, nullptr,
               {gradient, Dtype::float32, 1, size}, stream);
}

}  // namespace

void outlier_grad(Matrix grad_y, Matrix x, Activations codes, const int64_t* dims, int64_t r, int axis, float* gradient,
                  Stream stream) {
    const Source source{x, codes};
    const int64_t columns = axis == 1 ? grad_y.cols : source.cols();
    if (r == 0 || columns == 0) return;
    Product product{};
    product.narrow = axis == 1 ? source : Source{grad_y, {}};
    product.dims = axis == 1 ? nullptr : dims;
    product.codes = codes;
    product.M = grad_y.rows, product.columns = columns, product.r = r;
    product.row_stride = axis == 1 ? 1 : columns, product.column_stride = axis == 1 ? r : 1;
    if (axis == 0 && source.has_codes()) return outlier_grad_of(codes.codes, product, gradient, stream);
    const Matrix& wide = axis == 1 ? grad_y : x;
    switch (wide.dtype) {
        case Dtype::float32: return outlier_grad_of(static_cast<const float*>(wide.data), product, gradient, stream);
        case Dtype::float16: return outlier_grad_of(static_cast<const __half*>(wide.data), product, gradient, stream);
        case Dtype::bfloat16:
            return outlier_grad_of(static_cast<const __nv_bfloat16*>(wide.data), product, gradient, stream);
    }
}

}  // namespace prequant::cuda
