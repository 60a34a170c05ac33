// dx = dy (W + outliers), W = (code - zero_point) * scale, from the same packed words as the forward product.
//                                                                                          Meaning: reference.linear_dx
//
//   float32 where asked for   panels of float32 weights (panel_product.h), as they also serve groups, whose scales
//                             change along the columns of dx
//   otherwise                 dy in blocks of int16 times code - zero_point (block_product.h, which states the error).
//                             A scale for each row sits on the index that is summed over: dy is multiplied with it in
//                             float32 before it is rounded, so that the block's step fits the product. Outliers
//                             are added in float32
//
// Limited by multiply-adds from M of about 16; below by making panels.
#pragma once

#include "block_product.h"
#include "panel_product.h"

namespace prequant::PREQUANT_LEVEL {

inline void linear_dx_float(const Matrix& grad_y, const Weight& weight, const Outliers& outliers,
                            const MutableMatrix& grad_x) {
    panel_product(grad_y, weight.K, nullptr, grad_x,
                  [&](int64_t k, int64_t columns, int64_t n, int64_t count, float* panel, char* words) {
                      backward_panel(weight, n, count, k, panel, words);
                      const int64_t r = outliers.r;
                      for (int64_t j = 0; j < r; ++j) {
                          const int64_t dim = outliers.dims[j];
                          if (outliers.axis == 1 && dim >= k && dim < k + columns)
                              for (int64_t i = 0; i < count; ++i)
                                  panel[i * kPanelColumns + (dim - k)] += outliers.values[(n + i) * r + j];
                          if (outliers.axis == 0 && dim >= n && dim < n + count)
                              for (int64_t i = 0; i < columns; ++i)
                                  panel[(dim - n) * kPanelColumns + i] += outliers.values[j * weight.K + k + i];
                      }
                  });
}

// W^T as block_product takes it.
struct BackwardBlocks {
    static constexpr bool kInQuads = false;
    const Weight& weight;

    int64_t columns() const { return weight.K; }
    const float* factors() const { return weight.scale_rows == 1 ? nullptr : weight.scale; }
    int64_t segment_end(int64_t) const { return weight.N; }
    bool panel(int64_t k, int64_t n_begin, int64_t n_end, char* words, float*) const {
        transposed_word_panel(weight, n_begin, n_end, k, words);
        return false;
    }
    bool column_scales(int64_t, float* scales) const {
        for (int64_t c = 0; c < kPanelColumns; ++c) scales[c] = weight.scale[0];
        return weight.scale_rows == 1;
    }
    bool few(int64_t, int64_t, const BlockRows&, float*) const { return false; }
};

inline void linear_dx(Matrix grad_y, Weight weight, Outliers outliers, bool in_float32, MutableMatrix grad_x, Stream) {
    if (in_float32 || weight.G > 1) return linear_dx_float(grad_y, weight, outliers, grad_x);
    block_product(grad_y, BackwardBlocks{weight}, OutlierSide(outliers, false, weight.N, weight.K), nullptr, grad_x);
}

}  // namespace prequant::PREQUANT_LEVEL
