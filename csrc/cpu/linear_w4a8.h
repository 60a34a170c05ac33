// y = x̂ W^T + outliers + bias on 8-bit activations: (sum over g of float(S(a - za)(w - zw)) scale[n, g]) x_scale[m], then float terms.
//                                                                                                              Meaning: reference.linear_w4a8
//   task       512 rows of x x kTileColumns columns of y; for each piece of K (a group, or 4096 of one) the weight's panel is built once
//   outliers   a float32 matrix (M, r) made beforehand: x̂[:, idx], multiplied by O^T at the end, or x̂ O^T itself, added to y[:, idx]
//
// Requires   x.sums: of the codes of each of the weight's groups.
// Sums in    int32 within a piece, int64 over the pieces of a group: exact. Groups in float32 in index order: the same bits on every level.
// Limited by the integer multiply-adds from M of about 64; below by building panels.
#pragma once

#include "activation_rows.h"
#include "few_tokens.h"
#include "integer_panel.h"

namespace prequant::PREQUANT_LEVEL {

constexpr int64_t kIntegerRows = 512;
constexpr int64_t kOutlierDepth = 512;  // outliers whose weights are put into one float panel

// sums (rows, kTileColumns): the float sums of a task's products, before x_scale.
inline void integer_product(const Activations& x, int64_t m, int64_t rows, const Weight& weight, int64_t n, int64_t columns, void* panel_memory,
                            int64_t* long_sums, float* sums) {
    const int64_t K = weight.K, G = weight.G, size = K / G;
    IntegerPanel panel;
    std::memset(sums, 0, static_cast<size_t>(rows * kTileColumns) * sizeof(float));
    for (int64_t g = 0; g < G; ++g) {
        float scale[kTileColumns] = {};
        for (int64_t c = 0; c < columns; ++c) scale[c] = weight.scale[weight.block(n + c, g * size)];
        const bool is_whole = size <= kIntegerDepth;
        if (!is_whole) std::memset(long_sums, 0, static_cast<size_t>(rows * kTileColumns) * sizeof(int64_t));
        for (int64_t k = g * size; k < (g + 1) * size; k += kIntegerDepth) {
            const int64_t k_end = smaller(k + kIntegerDepth, (g + 1) * size);
            build_integer_panel(weight, n, columns, k, k_end, panel_memory, panel);
            for (int64_t i = 0, tiles = ceil_div(rows, kTileRows); tiles > 0; --tiles) {
                const int64_t height = ceil_div(rows - i, tiles);
                const uint8_t* codes = x.codes + (m + i) * K + k;
                int32_t zero_points[kTileRows], code_sums[kTileRows], products[kTileRows * kTileColumns];
                for (int64_t row = 0; row < height; ++row) {
                    zero_points[row] = x.zero_point[x.per_token ? m + i + row : 0];
                    if (is_whole) {
                        code_sums[row] = x.sums[(m + i + row) * G + g];
                    } else {
                        int32_t sum = 0;
                        for (int64_t j = 0; j < k_end - k; ++j) sum += codes[row * K + j];
                        code_sums[row] = sum;
                    }
                }
                multiply_integer_panel(panel, height, codes, K, zero_points, code_sums, products);
                for (int64_t row = 0; row < height; ++row) {
                    const int32_t* product = products + row * kTileColumns;
                    float* sum = sums + (i + row) * kTileColumns;
                    int64_t* long_sum = long_sums + (i + row) * kTileColumns;
                    for (int64_t c = 0; c < kTileColumns; ++c) {
                        if (is_whole)
                            sum[c] += static_cast<float>(product[c]) * scale[c];
                        else
                            long_sum[c] += product[c];
                    }
                }
                i += height;
            }
        }
        for (int64_t i = 0; !is_whole && i < rows; ++i)
            for (int64_t c = 0; c < kTileColumns; ++c) sums[i * kTileColumns + c] += static_cast<float>(long_sums[i * kTileColumns + c]) * scale[c];
    }
}

// Adds the outliers of columns n .. n + columns; side is this task's rows of the matrix (M, r), panel scratch of kOutlierDepth * kTileColumns floats.
inline void add_outliers(const Outliers& outliers, int64_t rows, int64_t n, int64_t columns, const float* side, float* panel, float* sums) {
    const int64_t r = outliers.r;
    if (outliers.axis == 0) {
        for (int64_t j = 0; j < r; ++j) {
            const int64_t c = outliers.dims[j] - n;
            for (int64_t i = 0; c >= 0 && c < columns && i < rows; ++i) sums[i * kTileColumns + c] += side[i * r + j];
        }
        return;
    }
    for (int64_t j0 = 0; j0 < r; j0 += kOutlierDepth) {
        const int64_t count = smaller(kOutlierDepth, r - j0);
        for (int64_t c = 0; c < kTileColumns; ++c)
            for (int64_t j = 0; j < count; ++j) panel[j * kTileColumns + c] = c < columns ? outliers.values[(n + c) * r + j0 + j] : 0.0f;
        multiply_panel<false>(rows, count, side + j0, r, panel, kTileColumns, sums, kTileColumns);
    }
}

inline void linear_w4a8(Activations x, const Matrix* raw, Weight weight, Outliers outliers, const float* bias, MutableMatrix y, Stream) {
    const int64_t M = x.M, N = weight.N, K = weight.K, r = outliers.r;
    const int64_t panels = ceil_div(N, kTileColumns);
    const ActivationRows source{raw ? *raw : Matrix{nullptr, Dtype::float32, 0, 0}, x};
    const int64_t rows_at_once = smaller(M, side_rows(r, kIntegerRows));
    const Buffer buffer(rows_at_once * r * static_cast<int64_t>(sizeof(float)));
    float* const side = static_cast<float*>(buffer.data());
#if PREQUANT_AVX512
    const bool is_few = rows_at_once == M && suits_few_tokens(x, weight);
    const Buffer tokens(is_few ? (M + 1) * line_count(K) * kLineCodes : 0);
    if (is_few) arrange_tokens(x, static_cast<int8_t*>(tokens.data()));
#endif
    for (int64_t m0 = 0; m0 < M; m0 += rows_at_once) {
        const int64_t here = smaller(rows_at_once, M - m0);
        if (r > 0 && outliers.axis == 1) gather_columns(source, m0, here, outliers.dims, r, side);
        if (r > 0 && outliers.axis == 0) multiply_rows(source, m0, here, outliers.values, r, side);
        const int64_t row_blocks = ceil_div(here, kIntegerRows), rows_a_task = ceil_div(here, row_blocks);
        parallel_for(row_blocks * panels, (rows_a_task + 16) * K * kTileColumns / 256, [&](int64_t begin, int64_t end) {
            constexpr int64_t kSums = kIntegerRows * kTileColumns;
            char* const memory = static_cast<char*>(thread_scratch(kIntegerPanelBytes + kSums * 12 + kOutlierDepth * kTileColumns * 4));
            int64_t* const long_sums = reinterpret_cast<int64_t*>(memory + kIntegerPanelBytes);
            float* const sums = reinterpret_cast<float*>(long_sums + kSums);
            float* const outlier_panel = sums + kSums;
            for (int64_t task = begin; task < end; ++task) {
                const int64_t block = task / panels * rows_a_task, m = m0 + block, n = task % panels * kTileColumns;
                const int64_t rows = smaller(rows_a_task, here - block), columns = smaller<int64_t>(kTileColumns, N - n);
#if PREQUANT_AVX512
                if (is_few)
                    few_tokens_product(x, static_cast<const int8_t*>(tokens.data()), weight, n, columns, sums);
                else
#endif
                    integer_product(x, m, rows, weight, n, columns, memory, long_sums, sums);
                for (int64_t i = 0; i < rows; ++i) {
                    const float scale = x.scale[x.per_token ? m + i : 0];
                    for (int64_t c = 0; c < kTileColumns; ++c) sums[i * kTileColumns + c] *= scale;
                }
                if (r > 0) add_outliers(outliers, rows, n, columns, side + block * r, outlier_panel, sums);
                for (int64_t i = 0; i < rows; ++i) {
                    float* row = sums + i * kTileColumns;
                    for (int64_t c = 0; bias && c < columns; ++c) row[c] += bias[n + c];
                    store_floats(row, columns, y.data, y.dtype, (m + i) * N + n);
                }
            }
        });
    }
}

}  // namespace prequant::PREQUANT_LEVEL
