// dx = dy (W + outliers), W = (code - zero_point) * scale: the same packed words as the forward, read along rows.   Meaning: reference.linear_dx
//
//   row n of weight_packed   k .. k+31     panel    row n: k .. k+31       Scales of rows and groups sit on the index that is summed over: they go
//   row n + 1                k .. k+31              row n + 1              into the panel, and so do the outliers.
//
// Sums in    float32.
// Limited by float32 multiply-adds from M of about 64; below by making panels.
#pragma once

#include "panel_product.h"
#include "weight_panel.h"

namespace prequant::PREQUANT_LEVEL {

inline void linear_dx(Matrix grad_y, Weight weight, Outliers outliers, MutableMatrix grad_x, Stream) {
    panel_product(grad_y, weight.K, nullptr, grad_x, [&](int64_t k, int64_t columns, int64_t n, int64_t count, float* panel, uint8_t* scratch) {
        backward_panel(weight, n, count, k, columns, panel, scratch);
        const int64_t r = outliers.r;
        for (int64_t j = 0; j < r; ++j) {
            const int64_t dim = outliers.dims[j];
            if (outliers.axis == 1 && dim >= k && dim < k + columns)
                for (int64_t i = 0; i < count; ++i) panel[i * kTileColumns + (dim - k)] += outliers.values[(n + i) * r + j];
            if (outliers.axis == 0 && dim >= n && dim < n + count)
                for (int64_t i = 0; i < columns; ++i) panel[(dim - n) * kTileColumns + i] += outliers.values[j * weight.K + k + i];
        }
    });
}

}  // namespace prequant::PREQUANT_LEVEL
