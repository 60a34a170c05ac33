// From integer sums to y: the zero points, the scales, the outliers, the bias and the cast.
//
//   sum over k of (qa - za)(qw - zw)  =  acc + (128 - za) sum(qw)  -  zw (sum(qa) - size za)
//                                        `----- product: all that needs the weight's codes  acc = sum of (qa - 128) qw
//
//   a block's tile of y     column   0..3 | 4..7 | ...       A thread owns 4 neighbouring columns in every kStride-th
//                           thread    0   |  1   | ...       row, so that it reads and writes whole vectors, and an
//                                                            outlier's 4 weights serve all of its rows.
//
// Rounds     once from the exact sum to float32, then each product and sum in float32, as the reference; nothing is
//            contracted.
#pragma once

#include "integer_operands.cuh"
#include "outliers.cuh"

namespace prequant::cuda {

constexpr int kOutlierStep = 16;

struct IntegerProduct {
    Activations x;
    Weight weight;
    int64_t group_size, chunks;  // chunks along K
    const uint8_t* codes;        // x.codes, or a copy whose rows begin on 16 bytes
    int64_t pitch;               // of its rows, in bytes
    bool is_ragged;              // groups are not whole pieces of 16 columns
    // Null, or (pieces, M, N): the products of columns [i, i + 1) * piece_columns of each group, instead of y.
    int32_t* pieces;
    int64_t piece_columns, pieces_a_group;

    // The columns of piece i; of all groups where there are no pieces.
    PREQUANT_HOST_DEVICE CodeRange columns(int64_t i) const {
        if (pieces == nullptr) return {0, weight.K};
        const int64_t g = i / pieces_a_group, begin = g * group_size + i % pieces_a_group * piece_columns,
                      end = (g + 1) * group_size;
        return {begin, begin + piece_columns < end ? begin + piece_columns : end};
    }
};

// What follows the integer product.
struct Epilogue {
    Source source;  // whose columns meet outliers of axis 1
    Outliers outliers;
    const float* side;  // of axis 0, else null
    const float* bias;
    MutableMatrix y;
    bool is_wide;  // quads of a row of y, and of the bias, are aligned
};

// Exact modulo 2^32, hence exact where the sum fits: groups of at most kPieceColumns columns (linear_w4a8.cu).
PREQUANT_DEVICE int32_t add_zero_points(int32_t product, int weight_zero_point, int32_t token_offset) {
    return static_cast<int32_t>(static_cast<uint32_t>(product) -
                                static_cast<uint32_t>(weight_zero_point) * static_cast<uint32_t>(token_offset));
}

PREQUANT_DEVICE int32_t product_of(int32_t sum, int token_zero_point, int32_t code_sum) {
    return static_cast<int32_t>(static_cast<uint32_t>(sum) +
                                static_cast<uint32_t>(128 - token_zero_point) * static_cast<uint32_t>(code_sum));
}

// sum(qa) - size za of row m and group g.
PREQUANT_DEVICE int32_t token_offset(const Activations& x, int64_t G, int64_t m, int64_t g, int64_t size) {
    return x.sums[m * G + g] - static_cast<int32_t>(size) * x.zero_point[x.per_token ? m : 0];
}

// The products of row m and four columns, into piece i.
PREQUANT_DEVICE void store_products(const IntegerProduct& product, int64_t i, int64_t m, int64_t n,
                                    const Vector<int32_t, kQuad>& products) {
    const int64_t N = product.weight.N;
    int32_t* const to = product.pieces + (i * product.x.M + m) * N + n;
    if (N % kQuad == 0) {
        store(to, products);
    } else {
#pragma unroll
        for (int v = 0; v < kQuad; ++v)
            if (n + v < N) to[v] = products.at[v];
    }
}

struct QuadSums {
    float at[kQuad];
};

template <typename T>
PREQUANT_DEVICE void store_quad(const Epilogue& epilogue, int64_t m, int64_t n, const QuadSums& sums) {
    T* to = static_cast<T*>(epilogue.y.data) + m * epilogue.y.cols + n;
    if (epilogue.is_wide) {
        Vector<T, kQuad> out;
#pragma unroll
        for (int v = 0; v < kQuad; ++v) out.at[v] = from_float<T>(sums.at[v]);
        store(to, out);
    } else {
#pragma unroll
        for (int v = 0; v < kQuad; ++v)
            if (n + v < epilogue.y.cols) to[v] = from_float<T>(sums.at[v]);
    }
}

// Shared memory that finish_tile asks for, in floats. Row c of the outliers' weights begins at c * pitch + c / 32,
// pitch odd: whether lanes write them one after the other or read four rows apart, they meet 32 different banks.
template <int kRows, int kColumns>
constexpr int kFinishFloats = kColumns * (kOutlierStep + 1) + kQuad + kOutlierStep * kRows;

PREQUANT_DEVICE int weight_place(int column, int pitch) { return column * pitch + column / kWarp; }

// Finishes rows m0 .. m0 + kRows and columns n0 .. n0 + kColumns of y. sums(row, column): the four scaled sums from
// there on; called once for each quad that y has. scratch: kFinishFloats, on 16 bytes. All threads of the block call
// it.
template <int kThreads, int kRows, int kColumns, typename Sums>
PREQUANT_DEVICE void finish_tile(const Epilogue& epilogue, int64_t m0, int64_t n0, bool has_columns, float* scratch,
                                 Sums sums) {
    constexpr int kQuads = kColumns / kQuad, kStride = kThreads / kQuads, kMine = (kRows + kStride - 1) / kStride;
    const int64_t M = epilogue.y.rows, N = epilogue.y.cols;
    const Outliers& outliers = epilogue.outliers;
    const int thread = static_cast<int>(threadIdx.x), column = thread % kQuads * kQuad, first_row = thread / kQuads;
    const int64_t n = n0 + column;
    const auto is_mine = [&](int i) {
        return first_row + i * kStride < kRows && m0 + first_row + i * kStride < M && n < N;
    };

    QuadSums mine[kMine];
#pragma unroll
    for (int i = 0; i < kMine; ++i) mine[i] = is_mine(i) ? sums(first_row + i * kStride, column) : QuadSums{};

    if (!has_columns && outliers.axis == 1) {
        float* const values = scratch;
        float* const gathered = scratch + kColumns * (kOutlierStep + 1) + kQuad;  // [kOutlierStep][kRows]
        for (int64_t first = 0; first < outliers.r; first += kOutlierStep) {
            const int count = static_cast<int>(outliers.r - first < kOutlierStep ? outliers.r - first : kOutlierStep),
                      pitch = count | 1;
            __syncthreads();
#pragma unroll 1
            for (int e = thread; e < kColumns * count; e += kThreads) {
                const int c = e / count, j = e - c * count;
                values[weight_place(c, pitch) + j] =
                    n0 + c < N ? outliers.values[(n0 + c) * outliers.r + first + j] : 0;
            }
#pragma unroll 1
            for (int e = thread; e < kRows * count; e += kThreads) {
                const int j = e / kRows, row = e - j * kRows;
                const int64_t k = outliers.dims[first + j];
                const bool is_known = m0 + row < M && k >= 0 && k < epilogue.source.cols();
                gathered[j * kRows + row] = is_known ? value_at(epilogue.source, m0 + row, k) : 0;
            }
            __syncthreads();
#pragma unroll 1
            for (int j = 0; j < count; ++j) {
                float weights[kQuad];
#pragma unroll
                for (int v = 0; v < kQuad; ++v) weights[v] = values[weight_place(column + v, pitch) + j];
#pragma unroll
                for (int i = 0; i < kMine; ++i) {
                    int row = first_row + i * kStride;
                    if constexpr (kRows % kStride != 0) row = row < kRows ? row : kRows - 1;  // one that is not stored
                    // The condition is always true; without it ptxas takes registers that it lacks.
                    const float number = row < kRows ? gathered[j * kRows + row] : 0;
#pragma unroll
                    for (int v = 0; v < kQuad; ++v) mine[i].at[v] = __fmaf_rn(number, weights[v], mine[i].at[v]);
                }
            }
        }
    }
    if (outliers.r > 0 && outliers.axis == 0) {
        int* const which = reinterpret_cast<int*>(scratch);  // j of a column, or -1
        __syncthreads();
        for (int c = thread; c < kColumns; c += kThreads) which[c] = -1;
        __syncthreads();
#pragma unroll 1
        for (int64_t j = thread; j < outliers.r; j += kThreads) {
            const int64_t c = outliers.dims[j] - n0;
            if (c >= 0 && c < kColumns) which[c] = static_cast<int>(j);
        }
        __syncthreads();
        const auto mine_of = load<Vector<int, kQuad>>(which + column);
#pragma unroll
        for (int v = 0; v < kQuad; ++v) {
            const int j = mine_of.at[v];
#pragma unroll
            for (int i = 0; i < kMine; ++i)
                if (j >= 0 && is_mine(i))
                    mine[i].at[v] += epilogue.side[(m0 + first_row + i * kStride) * outliers.r + j];
        }
    }

    if (epilogue.bias != nullptr && n < N) {
        Vector<float, kQuad> bias{};
        if (epilogue.is_wide) {
            bias = load<Vector<float, kQuad>>(epilogue.bias + n);
        } else {
#pragma unroll
            for (int v = 0; v < kQuad; ++v)
                if (n + v < N) bias.at[v] = epilogue.bias[n + v];
        }
#pragma unroll
        for (int i = 0; i < kMine; ++i)
#pragma unroll
            for (int v = 0; v < kQuad; ++v) mine[i].at[v] = __fadd_rn(mine[i].at[v], bias.at[v]);
    }
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
        if (!is_mine(i)) continue;
        const int64_t m = m0 + first_row + i * kStride;
        switch (epilogue.y.dtype) {
            case Dtype::float32: store_quad<float>(epilogue, m, n, mine[i]); break;
            case Dtype::float16: store_quad<__half>(epilogue, m, n, mine[i]); break;
            case Dtype::bfloat16: store_quad<__nv_bfloat16>(epilogue, m, n, mine[i]); break;
        }
    }
}

}  // namespace prequant::cuda
