// Outliers |w - mean| > threshold * std and their clipping energy, for each column and each row.
//                                                                                   Meaning: reference.outlier_counts
//                 segment 0 (32 lanes x 16 bytes)  segment 1 ...   A warp takes one segment of columns through one band
//   band 0  row 0   l0 l0 l0 l0 | l1 ... | l31                     of rows. A lane keeps the counts of its columns in
//           row 1   ...                                            shared memory; the lanes' counts of a row are added
//   band 1  ...                                                    by shuffles, where the row has any. Both go to
//                                                                  scratch, and a second pass adds column k over the
//                                                                  bands and row n over the segments.
//
// Requires   16-byte loads need aligned rows (K a multiple of a lane's columns); otherwise a lane's columns lie 32
//            apart and are read singly.
// Sums in    int64 that saturates. The terms are not negative, so that no order of the sums changes a bit.
// Limited by one read of the weight where float64 runs at a half of float32's rate, by 3 float64 operations an element
//            elsewhere.
#include <cmath>

#include "cuda.h"
#include "portable.cuh"

namespace prequant::cuda {

namespace {

constexpr int kWarpsPerBlock = 4;
// Leaves a thread 128 registers; without it ptxas spills to fit more warps than the loads need.
constexpr int kBlocksPerSm = 4;

struct Tallies {  // of `length` columns or rows, one such list for each part of the matrix
    int* counts;
    int64_t* energy;
};

__device__ __forceinline__ int64_t energy_of(double deviation, double limit, double sigma) {
    const double excess = __ddiv_rn(__dsub_rn(deviation, limit), sigma),
                 units = rint(__dmul_rn(__dmul_rn(excess, excess), kEnergyUnits));
    return units >= 0x1p63 ? INT64_MAX : static_cast<int64_t>(units);
}

// Of a warp's columns: [j][lane] is column j of a lane. The padding lets 32 neighbouring columns be read back without
// bank conflicts.
template <int kColumns>
struct ColumnTallies {
    int64_t energy[kColumns][kWarp + 16 / kColumns];
    int counts[kColumns][kWarp + 32 / kColumns];
};

template <typename T, bool kWide>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock, kBlocksPerSm)
    outlier_counts_kernel(const T* __restrict__ weight, int64_t N, int64_t K, const double* __restrict__ mean,
                          const double* __restrict__ std, double threshold, unsigned segments, int64_t bands,
                          int64_t band_rows, Tallies columns, Tallies rows) {
    // kRowsAhead: as many rows as one word has marks for.
    constexpr int kVector = kVectorBytes / sizeof(T), kRowsAhead = 32 / kVector;
    const int64_t segment = blockIdx.x % segments, band = int64_t(blockIdx.x / segments) * kWarpsPerBlock + threadIdx.y;
    const int lane = threadIdx.x;
    if (band >= bands) return;

    // Column j of this lane. Lanes beyond the last column read it again and count nothing.
    const int64_t first_column = segment * kWarp * kVector + (kWide ? lane * kVector : lane);
    const auto column = [&](int j) { return first_column + (kWide ? j : j * kWarp); };
    unsigned is_inside = 0;
#pragma unroll
    for (int j = 0; j < kVector; ++j) is_inside |= unsigned(column(j) < K) << j;
    const auto read_row = [&](int64_t n) {
        if constexpr (kWide) {
            return load<Vector<T, kVector>>(weight + n * K + (is_inside ? first_column : K - kVector));
        } else {
            Vector<T, kVector> values;
#pragma unroll
            for (int j = 0; j < kVector; ++j) values.at[j] = weight[n * K + (column(j) < K ? column(j) : K - 1)];
            return values;
        }
    };

    const double center = *mean, sigma = *std;
    const double limit = sigma > 0 ? __dmul_rn(threshold, sigma) : INFINITY;  // a constant matrix has no outliers
    const auto deviation_of = [&](T value) { return fabs(__dsub_rn(static_cast<double>(to_float(value)), center)); };
    PREQUANT_SHARED(columns_of_warps, ColumnTallies<kVector>[kWarpsPerBlock]);
    ColumnTallies<kVector>& own = columns_of_warps[threadIdx.y];  // until the end a lane sees its own columns only
#pragma unroll
    for (int j = 0; j < kVector; ++j) own.counts[j][lane] = 0, own.energy[j][lane] = 0;
    const int64_t end = min(N, (band + 1) * band_rows);
    for (int64_t n0 = band * band_rows; n0 < end; n0 += kWarp) {
        const int batch = static_cast<int>(min(end - n0, int64_t(kWarp)));
        int row_count = 0;  // of row n0 + lane
        int64_t row_energy = 0;
        for (int i0 = 0; i0 < batch; i0 += kRowsAhead) {
            Vector<T, kVector> ahead[kRowsAhead];
#pragma unroll
            for (int u = 0; u < kRowsAhead; ++u)
                if (i0 + u < batch) ahead[u] = read_row(n0 + i0 + u);
            unsigned marks = 0;  // bit u * kVector + j: column j of row i0 + u is an outlier
#pragma unroll
            for (int u = 0; u < kRowsAhead; ++u) {
                if (i0 + u >= batch) break;
                unsigned found = 0;
#pragma unroll
                for (int j = 0; j < kVector; ++j) found |= unsigned(deviation_of(ahead[u].at[j]) > limit) << j;
                marks |= (found & is_inside) << (u * kVector);
            }

            // Outliers are rare. What follows reads them again, so that it is one piece of code for all rows and not
            // one for each.
            for (int u = 0; __any_sync(kAllLanes, marks); ++u, marks >>= kVector) {
                const unsigned found = marks & ((1u << kVector) - 1);
                if (!__any_sync(kAllLanes, found)) continue;
                int count = __popc(found);
                int64_t energy = 0;
                for (unsigned left = found; left != 0; left &= left - 1) {
                    const int j = __ffs(static_cast<int>(left)) - 1;
                    const int64_t one = energy_of(deviation_of(weight[(n0 + i0 + u) * K + column(j)]), limit, sigma);
                    own.counts[j][lane] += 1;
                    own.energy[j][lane] = saturating_add(own.energy[j][lane], one);
                    energy = saturating_add(energy, one);
                }
#pragma unroll
                for (int width = 1; width < kWarp; width *= 2) {
                    count += __shfl_xor_sync(kAllLanes, count, width);
                    energy = saturating_add(energy, __shfl_xor_sync(kAllLanes, energy, width));
                }
                if (lane == i0 + u) row_count = count, row_energy = energy;
            }
        }
        if (lane < batch) {
            rows.counts[segment * N + n0 + lane] = row_count;
            rows.energy[segment * N + n0 + lane] = row_energy;
        }
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kVector; ++i) {  // neighbouring lanes write neighbouring columns
        const int64_t k = segment * kWarp * kVector + i * kWarp + lane;
        if (k >= K) continue;
        const int j = kWide ? lane % kVector : i, owner = kWide ? i * (kWarp / kVector) + lane / kVector : lane;
        columns.counts[band * K + k] = own.counts[j][owner];
        columns.energy[band * K + k] = own.energy[j][owner];
    }
}

__global__ void add_tallies_kernel(Tallies parts, int64_t number_of_parts, int64_t length, int64_t* __restrict__ counts,
                                   int64_t* __restrict__ energy) {
    const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= length) return;
    int64_t count = 0, sum = 0;
#pragma unroll 4
    for (int64_t part = 0; part < number_of_parts; ++part) {
        count += parts.counts[part * length + i];
        sum = saturating_add(sum, parts.energy[part * length + i]);
    }
    counts[i] = count;
    energy[i] = sum;
}

Tallies make_tallies(int64_t size, Stream stream) {
    return {static_cast<int*>(stream.scratch(size * static_cast<int64_t>(sizeof(int)))),
            static_cast<int64_t*>(stream.scratch(size * static_cast<int64_t>(sizeof(int64_t))))};
}

void add_tallies(Tallies parts, int64_t number_of_parts, int64_t length, int64_t* counts, int64_t* energy,
                 Stream stream) {
    constexpr int64_t kThreads = 128;
    if (length == 0) return;
    const LaunchConfig config{
        .grid = dim3(static_cast<unsigned>(ceil_div(length, kThreads))), .block = dim3(kThreads), .stream = stream};
    launch("add_tallies_kernel", add_tallies_kernel, config, parts, number_of_parts, length, counts, energy);
}

// Warps enough for every scheduler of a large GPU; beyond that, longer bands write fewer tallies.
int64_t rows_of_band(int64_t N, int64_t segments) {
    constexpr int64_t kWarpsWanted = 1024, kFewest = 8, kMost = 512;
    return std::clamp(ceil_div(N, std::max(kWarpsWanted / segments, int64_t(1))), kFewest, kMost);
}

template <typename T>
void count_outliers(Matrix weight, const double* mean, const double* std, double threshold, int64_t* column_counts,
                    int64_t* column_energy, int64_t* row_counts, int64_t* row_energy, Stream stream) {
    constexpr int64_t kVector = kVectorBytes / sizeof(T);
    const int64_t N = weight.rows, K = weight.cols, segments = ceil_div(K, kWarp * kVector);
    const int64_t band_rows = N && K ? rows_of_band(N, segments) : 1, bands = K ? ceil_div(N, band_rows) : 0;
    const Tallies columns = make_tallies(bands * K, stream), rows = make_tallies(N * segments, stream);
    if (N && K) {
        const bool is_wide = K % kVector == 0 && is_aligned(weight.data, kVectorBytes);
        const LaunchConfig config{.grid = dim3(static_cast<unsigned>(segments * ceil_div(bands, kWarpsPerBlock))),
                                  .block = dim3(kWarp, kWarpsPerBlock),
                                  .stream = stream};
        launch("outlier_counts_kernel", is_wide ? outlier_counts_kernel<T, true> : outlier_counts_kernel<T, false>,
               config, static_cast<const T*>(weight.data), N, K, mean, std, threshold, static_cast<unsigned>(segments),
               bands, band_rows, columns, rows);
    }
    add_tallies(columns, bands, K, column_counts, column_energy, stream);
    add_tallies(rows, segments, N, row_counts, row_energy, stream);
}

}  // namespace

void outlier_counts(Matrix weight, const double* mean, const double* std, double threshold, int64_t* column_counts,
                    int64_t* column_energy, int64_t* row_counts, int64_t* row_energy, Stream stream) {
    const auto count = weight.dtype == Dtype::float32   ? count_outliers<float>
                       : weight.dtype == Dtype::float16 ? count_outliers<__half>
                                                        : count_outliers<__nv_bfloat16>;
    count(weight, mean, std, threshold, column_counts, column_energy, row_counts, row_energy, stream);
}

}  // namespace prequant::cuda
