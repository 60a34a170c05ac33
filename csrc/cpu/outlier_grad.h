// Gradient of the outlier weight: dO = dy^T x (N, r) for input columns, dy[:, idx]^T x̂ (r, K) for output rows.
//                                                                                       Meaning: reference.outlier_grad
//
//   Both are narrow^T wide: narrow (M, r) is x or dy[:, idx], wide (M, columns) is dy or x̂, and a task makes
//   64 columns of (r, columns).
//
// Sums in    float32, in the order of M whatever the threads.
// Limited by one read of `wide`.
#pragma once

#include "activation_rows.h"
#include "tile.h"

namespace prequant::PREQUANT_LEVEL {

inline void outlier_grad(Matrix grad_y, Matrix x, Activations codes, const int64_t* dims, int64_t r, int axis,
                         float* gradient, Stream) {
    constexpr int64_t kColumns = 64, kRows = 256, kOutliers = 48;  // of a task; rows and outliers at a time
    const ActivationRows activations{x, codes}, grad{grad_y, {}};
    const ActivationRows& wide = axis == 1 ? grad : activations;
    const int64_t M = grad_y.rows, columns = wide.columns();
    if (r * columns == 0) return;  // an empty tensor's data is null, which memset may not be given
    std::memset(gradient, 0, static_cast<size_t>(r * columns) * sizeof(float));
    if (M == 0) return;

    const int64_t rows_at_once = smaller(M, side_rows(r, kRows));
    const bool is_copied = !(axis == 1 && x.data != nullptr && x.dtype == Dtype::float32);
    const Buffer buffer(is_copied ? rows_at_once * r * static_cast<int64_t>(sizeof(float)) : 0);
    float* const copy = static_cast<float*>(buffer.data());
    for (int64_t m0 = 0; m0 < M; m0 += rows_at_once) {
        const int64_t rows = smaller(rows_at_once, M - m0);
        if (axis == 0) gather_columns(grad, m0, rows, dims, r, copy);
        if (axis == 1 && is_copied)
            for (int64_t i = 0; i < rows; ++i) {
                const float* row = activations.load(m0 + i, 0, r, copy + i * r);
                if (row != copy + i * r) std::memcpy(copy + i * r, row, static_cast<size_t>(r) * sizeof(float));
            }
        const float* const narrow = is_copied ? copy : static_cast<const float*>(x.data) + m0 * r;
        parallel_for(ceil_div(columns, kColumns), rows * (r + 4), [&](int64_t begin, int64_t end) {
            float* const block = static_cast<float*>(
                thread_scratch((kRows + kOutliers) * kColumns * static_cast<int64_t>(sizeof(float))));
            float* const sums = block + kRows * kColumns;
            for (int64_t task = begin; task < end; ++task) {
                const int64_t column = task * kColumns, width = smaller(kColumns, columns - column);
                // Where element (j, c) of this task's gradient lies.
                const auto at = [&](int64_t j, int64_t c) -> float& {
                    return gradient[axis == 1 ? (column + c) * r + j : j * columns + column + c];
                };
                for (int64_t m = 0; m < rows; m += kRows) {
                    const int64_t height = smaller(kRows, rows - m);
                    const bool is_direct =
                        wide.has_floats() && wide.floats.dtype == Dtype::float32 && width == kColumns;
                    const float* source = block;
                    int64_t stride = kColumns;
                    if (is_direct) {
                        source = static_cast<const float*>(wide.floats.data) + (m0 + m) * columns + column;
                        stride = columns;
                    }
                    for (int64_t i = 0; i < height && !is_direct; ++i) {
                        float* row = block + i * kColumns;
                        const float* loaded = wide.load(m0 + m + i, column, width, row);
                        if (loaded != row) std::memcpy(row, loaded, static_cast<size_t>(width) * sizeof(float));
                        for (int64_t c = width; c < kColumns; ++c) row[c] = 0;
                    }
                    for (int64_t j0 = 0; j0 < r; j0 += kOutliers) {
                        const int64_t count = smaller(kOutliers, r - j0);
                        for (int64_t j = 0; j < count; ++j)
                            for (int64_t c = 0; c < kColumns; ++c)
                                sums[j * kColumns + c] = c < width ? at(j0 + j, c) : 0;
                        for (int64_t c = 0; c < kColumns; c += kTileColumns)
                            multiply_panel<true>(count, height, narrow + m * r + j0, r, source + c, stride, sums + c,
                                                 kColumns);
                        for (int64_t j = 0; j < count; ++j)
                            for (int64_t c = 0; c < width; ++c) at(j0 + j, c) = sums[j * kColumns + c];
                    }
                }
            }
        });
    }
}

}  // namespace prequant::PREQUANT_LEVEL
