// y = x (W + outliers)^T + bias, W = (code - zero_point) * scale.                                              Meaning: reference.linear_w4a16
//
//   row n of weight_packed   k 0 1 2 ...          panel    k=0: n n+1 ... n+31      Outlier dimensions have value 0 in W, so that their float
//   row n + 1                k 0 1 2 ...    ->             k=1: n n+1 ... n+31      values are added to the panel: no product of their own.
//
// Sums in    float32.
// Limited by float32 multiply-adds from M of about 64; below by making panels.
#pragma once

#include "panel_product.h"
#include "weight_panel.h"

namespace prequant::PREQUANT_LEVEL {

inline void linear_w4a16(Matrix x, Weight weight, Outliers outliers, const float* bias, MutableMatrix y, Stream) {
    panel_product(x, weight.N, bias, y, [&](int64_t n, int64_t rows, int64_t k, int64_t count, float* panel, uint8_t* scratch) {
        forward_panel(weight, n, rows, k, count, panel, scratch);
        const int64_t r = outliers.r;
        for (int64_t j = 0; j < r; ++j) {
            const int64_t dim = outliers.dims[j];
            if (outliers.axis == 1 && dim >= k && dim < k + count)
                for (int64_t i = 0; i < rows; ++i) panel[(dim - k) * kTileColumns + i] += outliers.values[(n + i) * r + j];
            if (outliers.axis == 0 && dim >= n && dim < n + rows)
                for (int64_t i = 0; i < count; ++i) panel[i * kTileColumns + (dim - n)] += outliers.values[j * weight.K + k + i];
        }
    });
}

}  // namespace prequant::PREQUANT_LEVEL
