// outlier_side: side[m, j] = sum over k of x[m, k] values[j, k]
// finish:       y[m, n] = sum over s of partial[s, m, n] + sum over j of x[m, dims[j]] values[n, j] + bias[n]  (axis 1)
//                                                        + side[m, j] where n = dims[j]                        (axis 0)
// Meaning: the outlier terms of reference.linear_w4a16 and reference.linear_w4a8.
//
//   outlier_side   k      0..3 | 4..7 | ... | 1020..1023 | 1024.. |    One block makes 4 rows x 1 or 8 outliers: a
//                  thread  0   |  1   | ... |     255    |   0    |    thread keeps their sums over its columns; the
//                                                                      block adds up its threads.
//
//   finish         n      0..3 | 4..7 | ... | 124..127                 A warp makes 1 or 4 rows x 128 columns. Axis 1:
//                  lane    0   |  1   | ... |    31                    the block has values (128, 16) and x[:, dims] in
//                                                                      shared memory; axis 0: which j, if any, each
//                                                                      column is.
//
// Requires   quads need K % 4 == 0 (finish: N % 4 == 0) and aligned pointers; otherwise numbers are read one by one.
//            dims distinct; those out of range are skipped.
// Sums in    float32. outlier_side: each thread in the order of k, then the lanes by halves, then the warps in turn,
//            whatever M is; the scale of codes multiplies the sum. finish: as written.
// Limited by outlier_side: one read of x (and of values, from L2); finish: one read of partial and one write of y.
#include "outliers.cuh"

namespace prequant::cuda {

namespace {

// ---- outlier_side ----

constexpr int kSideThreads = 256, kSideWarps = kSideThreads / kWarp, kSideRows = 4;

// Four numbers of one row that a thread owns: neighbours, or kSideThreads apart so that narrow loads coalesce too. Past
// the row's end: 0.
template <typename T, bool kWide>
__device__ __forceinline__ void load_quad(const T* row, int64_t k, int64_t K, float bias, float (&values)[kQuad]) {
    if constexpr (kWide && sizeof(T) == 1) {
        const auto word = load<uint32_t>(row + k);
#pragma unroll
        for (int i = 0; i < kQuad; ++i) values[i] = biased_code(word, i) - bias;
    } else if constexpr (kWide) {
        const auto quad = load<Vector<T, kQuad>>(row + k);
#pragma unroll
        for (int i = 0; i < kQuad; ++i) values[i] = to_float(quad.at[i]);
    } else {
#pragma unroll
        for (int i = 0; i < kQuad; ++i) {
            const int64_t at = k + i * kSideThreads;
            if constexpr (sizeof(T) == 1)
                values[i] = at < K ? biased_code(row[at], 0) - bias : 0;
            else
                values[i] = at < K ? to_float(row[at]) : 0;
        }
    }
}

template <typename T, bool kWide, int kOutliers>
__global__ void __launch_bounds__(kSideThreads)
    outlier_side_kernel(const T* __restrict__ x, Source source, const float* __restrict__ values, int64_t r,
                        int outlier_tiles, float* __restrict__ side) {
    PREQUANT_SHARED(warp_sums, float[kSideWarps][kSideRows * kOutliers]);
    const int64_t M = source.rows(), K = source.cols(), m = int64_t(blockIdx.x / outlier_tiles) * kSideRows;
    const int64_t j = int64_t(blockIdx.x % outlier_tiles) * kOutliers;
    const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;

    // Rows and outliers past the end repeat the last one, and are not written.
    const T* rows[kSideRows];
    const float* weights[kOutliers];
    float bias[kSideRows];
#pragma unroll
    for (int i = 0; i < kSideRows; ++i) {
        const int64_t row = m + i < M ? m + i : M - 1;
        rows[i] = x + row * K;
        bias[i] = sizeof(T) == 1 ? kCodeBias + static_cast<float>(source.codes.zero_point[source.token(row)]) : 0;
    }
#pragma unroll
    for (int i = 0; i < kOutliers; ++i) weights[i] = values + (j + i < r ? j + i : r - 1) * K;

    float sums[kSideRows][kOutliers] = {};
    for (int64_t k = kWide ? int64_t(thread) * kQuad : thread; k < K; k += kSideThreads * kQuad) {
        float numbers[kSideRows][kQuad];
#pragma unroll
        for (int i = 0; i < kSideRows; ++i) load_quad<T, kWide>(rows[i], k, K, bias[i], numbers[i]);
#pragma unroll
        for (int o = 0; o < kOutliers; ++o) {
            float weight[kQuad];
            load_quad<float, kWide>(weights[o], k, K, 0, weight);
#pragma unroll
            for (int i = 0; i < kSideRows; ++i)
#pragma unroll
                for (int c = 0; c < kQuad; ++c) sums[i][o] = __fmaf_rn(numbers[i][c], weight[c], sums[i][o]);
        }
    }

#pragma unroll
    for (int i = 0; i < kSideRows; ++i)
#pragma unroll
        for (int o = 0; o < kOutliers; ++o) {
            for (int half = kWarp / 2; half > 0; half /= 2) sums[i][o] += __shfl_xor_sync(kAllLanes, sums[i][o], half);
            if (lane == 0) warp_sums[warp][i * kOutliers + o] = sums[i][o];
        }
    __syncthreads();
    if (thread >= kSideRows * kOutliers) return;
    const int64_t row = m + thread / kOutliers, outlier = j + thread % kOutliers;
    if (row >= M || outlier >= r) return;
    float sum = warp_sums[0][thread];
    for (int w = 1; w < kSideWarps; ++w) sum += warp_sums[w][thread];
    side[row * r + outlier] = sizeof(T) == 1 ? sum * source.codes.scale[source.token(row)] : sum;
}

template <typename T>
void outlier_side_of(const T* x, const Source& source, const Outliers& outliers, float* side, Stream stream) {
    constexpr int kTile = 8;  // outliers that share one read of x
    constexpr int64_t kFewRows = 64;  // up to here blocks are scarcer than reads of x, which L2 answers
    const int64_t M = source.rows(), row_tiles = ceil_div(M, kSideRows);
    const bool is_wide =
        source.cols() % kQuad == 0 && is_aligned(x, kQuad * sizeof(T)) && is_aligned(outliers.values, kVectorBytes);
    const int outlier_tiles = static_cast<int>(M <= kFewRows ? outliers.r : ceil_div(outliers.r, kTile));
    const LaunchConfig config{
        .grid = grid_of("outlier_side", row_tiles * outlier_tiles), .block = dim3(kSideThreads), .stream = stream};
    const auto kernel = M <= kFewRows
                            ? (is_wide ? outlier_side_kernel<T, true, 1> : outlier_side_kernel<T, false, 1>)
                            : (is_wide ? outlier_side_kernel<T, true, kTile> : outlier_side_kernel<T, false, kTile>);
    launch("outlier_side_kernel", kernel, config, x, source, outliers.values, outliers.r, outlier_tiles, side);
}

// ---- finish ----

constexpr int kFinishWarps = 4, kStage = 16;  // outliers in shared memory at a time

template <typename T, int kVector, int kRows>
__global__ void __launch_bounds__(kFinishWarps* kWarp)
    finish_kernel(const float* __restrict__ partial, int splits, Source x, Outliers outliers,
                  const float* __restrict__ side, const float* __restrict__ bias, int64_t M, int64_t N,
                  unsigned column_tiles, T* __restrict__ y) {
    constexpr int kColumns = kWarp * kVector;
    const int lane = static_cast<int>(threadIdx.x), warp = static_cast<int>(threadIdx.y), thread = warp * kWarp + lane;
    const int threads = static_cast<int>(blockDim.y) * kWarp, tile_rows = static_cast<int>(blockDim.y) * kRows;
    const int64_t first_row = int64_t(blockIdx.x / column_tiles) * tile_rows,
                  first_column = int64_t(blockIdx.x % column_tiles) * kColumns;
    const int64_t m = first_row + warp * kRows, n = first_column + lane * kVector;
    const bool is_inside = n < N;  // N % kVector == 0: then the whole quad is

    float sums[kRows][kVector] = {};
#pragma unroll(kRows == 1 ? 8 : 4)
    for (int s = 0; s < splits; ++s)
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            if (!is_inside || m + i >= M) continue;
            const auto part = load<Vector<float, kVector>>(partial + (s * M + m + i) * N + n);
#pragma unroll
            for (int v = 0; v < kVector; ++v) sums[i][v] += part.at[v];
        }

    if (outliers.r > 0 && outliers.axis == 1) {
        // Row n of the tile begins at n * pitch + n / 32, pitch odd: lanes 1 or 4 rows apart then meet 32 different
        // banks.
        PREQUANT_SHARED(values, float[kColumns * (kStage + 1) + kVector]);
        PREQUANT_SHARED(gathered, Vector<float, kRows>[kStage][kFinishWarps]);  // x[m, dims[j]] of a warp's rows
        for (int64_t first = 0; first < outliers.r; first += kStage) {
            const int count = static_cast<int>(outliers.r - first < kStage ? outliers.r - first : kStage),
                      pitch = count | 1;
            __syncthreads();
            for (int e = thread; e < kColumns * count; e += threads) {
                const int row = e / count, j = e - row * count;
                if (first_column + row < N)
                    values[row * pitch + row / kWarp + j] =
                        outliers.values[(first_column + row) * outliers.r + first + j];
            }
            for (int e = thread; e < tile_rows * count; e += threads) {
                const int j = e / tile_rows, row = e - j * tile_rows;
                const int64_t k = outliers.dims[first + j];
                const bool is_known = first_row + row < M && k >= 0 && k < x.cols();
                gathered[j][row / kRows].at[row % kRows] = is_known ? value_at(x, first_row + row, k) : 0;
            }
            __syncthreads();
            if (!is_inside) continue;
            for (int j = 0; j < count; ++j) {
                float weight[kVector];
#pragma unroll
                for (int v = 0; v < kVector; ++v)
                    weight[v] = values[(lane * kVector + v) * pitch + (lane * kVector + v) / kWarp + j];
                const auto numbers = load<Vector<float, kRows>>(&gathered[j][warp]);
#pragma unroll
                for (int i = 0; i < kRows; ++i)
#pragma unroll
                    for (int v = 0; v < kVector; ++v) sums[i][v] = __fmaf_rn(numbers.at[i], weight[v], sums[i][v]);
            }
        }
    }
    if (outliers.r > 0 && outliers.axis == 0) {
        PREQUANT_SHARED(which, Vector<int, kVector>[kWarp]);  // j of a column, or -1
        for (int c = thread; c < kColumns; c += threads) which[c / kVector].at[c % kVector] = -1;
        __syncthreads();
        for (int64_t j = thread; j < outliers.r; j += threads) {
            const int64_t column = outliers.dims[j] - first_column;
            if (column >= 0 && column < kColumns) which[column / kVector].at[column % kVector] = static_cast<int>(j);
        }
        __syncthreads();
        const auto mine = load<Vector<int, kVector>>(which + lane);
#pragma unroll
        for (int v = 0; v < kVector; ++v)
            if (mine.at[v] >= 0 && is_inside)
#pragma unroll
                for (int i = 0; i < kRows; ++i)
                    if (m + i < M) sums[i][v] += side[(m + i) * outliers.r + mine.at[v]];
    }

    if (!is_inside) return;
    Vector<float, kVector> offset{};
    if (bias != nullptr) offset = load<Vector<float, kVector>>(bias + n);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
        if (m + i >= M) continue;
        Vector<T, kVector> out;
#pragma unroll
        for (int v = 0; v < kVector; ++v)
            out.at[v] = from_float<T>(bias != nullptr ? sums[i][v] + offset.at[v] : sums[i][v]);
        store(y + (m + i) * N + n, out);
    }
}

template <typename T>
void finish_to(const float* partial, int splits, const Source& x, const Outliers& outliers, const float* side,
               const float* bias, MutableMatrix y, Stream stream) {
    constexpr int64_t kFewRows = 64;  // above it a warp makes 4 rows: they share the values of the outliers
    constexpr int kRows = 4;
    const bool is_few = y.rows <= kFewRows;
    const bool is_wide = y.cols % kQuad == 0 && is_aligned(y.data, kQuad * sizeof(T)) &&
                         is_aligned(bias, kVectorBytes) && is_aligned(partial, kVectorBytes);
    const int64_t column_tiles = ceil_div(y.cols, kWarp * (is_wide ? kQuad : 1)),
                  row_groups = ceil_div(y.rows, is_few ? 1 : kRows);
    const int warps = static_cast<int>(std::min<int64_t>(row_groups, kFinishWarps));
    const LaunchConfig config{.grid = grid_of("finish", ceil_div(row_groups, warps) * column_tiles),
                              .block = dim3(kWarp, warps),
                              .stream = stream};
    const auto kernel = is_few ? (is_wide ? finish_kernel<T, kQuad, 1> : finish_kernel<T, 1, 1>)
                               : (is_wide ? finish_kernel<T, kQuad, kRows> : finish_kernel<T, 1, kRows>);
    launch("finish_kernel", kernel, config, partial, splits, x, outliers, side, bias, y.rows, y.cols,
           static_cast<unsigned>(column_tiles), static_cast<T*>(y.data));
}

}  // namespace

void outlier_side(const Source& x, const Outliers& outliers, float* side, Stream stream) {
    if (x.rows() == 0 || outliers.r == 0) return;
    if (x.has_codes()) return outlier_side_of(x.codes.codes, x, outliers, side, stream);
    switch (x.floats.dtype) {
        case Dtype::float32:
            return outlier_side_of(static_cast<const float*>(x.floats.data), x, outliers, side, stream);
        case Dtype::float16:
            return outlier_side_of(static_cast<const __half*>(x.floats.data), x, outliers, side, stream);
        case Dtype::bfloat16:
            return outlier_side_of(static_cast<const __nv_bfloat16*>(x.floats.data), x, outliers, side, stream);
    }
}

void finish(const float* partial, int splits, const Source& x, const Outliers& outliers, const float* side,
            const float* bias, MutableMatrix y, Stream stream) {
    if (y.rows == 0 || y.cols == 0) return;
    switch (y.dtype) {
        case Dtype::float32: return finish_to<float>(partial, splits, x, outliers, side, bias, y, stream);
        case Dtype::float16: return finish_to<__half>(partial, splits, x, outliers, side, bias, y, stream);
        case Dtype::bfloat16: return finish_to<__nv_bfloat16>(partial, splits, x, outliers, side, bias, y, stream);
    }
}

}  // namespace prequant::cuda
