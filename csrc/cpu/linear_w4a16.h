// y = x (W + outliers)^T + bias, W = (code - zero_point) * scale.                       Meaning: reference.linear_w4a16
//
//   float32 where asked for   panels of float32 weights (panel_product.h); outlier dimensions have value 0 in W, so
//                             that their float values are added to the panel: no product of their own
//   otherwise                 x in blocks of int16 times code - zero_point (block_product.h, which states the error);
//                             outliers are added in float32
//
// Limited by multiply-adds from M of about 16; below by making panels.
#pragma once

#include "block_product.h"
#include "panel_product.h"

namespace prequant::PREQUANT_LEVEL {

inline void linear_w4a16_float(const Matrix& x, const Weight& weight, const Outliers& outliers, const float* bias,
                               const MutableMatrix& y) {
    panel_product(x, weight.N, bias, y,
                  [&](int64_t n, int64_t rows, int64_t k, int64_t count, float* panel, char* words) {
                      forward_panel(weight, n, k, count, panel, words);
                      const int64_t r = outliers.r;
                      for (int64_t j = 0; j < r; ++j) {
                          const int64_t dim = outliers.dims[j];
                          if (outliers.axis == 1 && dim >= k && dim < k + count)
                              for (int64_t i = 0; i < rows; ++i)
                                  panel[(dim - k) * kPanelColumns + i] += outliers.values[(n + i) * r + j];
                          if (outliers.axis == 0 && dim >= n && dim < n + rows)
                              for (int64_t i = 0; i < count; ++i)
                                  panel[i * kPanelColumns + (dim - n)] += outliers.values[j * weight.K + k + i];
                      }
                  });
}

// W as block_product takes it.
struct ForwardBlocks {
    static constexpr bool kInQuads = true;
    const Weight& weight;

    int64_t columns() const { return weight.N; }
    const float* factors() const { return nullptr; }
    int64_t segment_end(int64_t k) const { return (k / (weight.K / weight.G) + 1) * (weight.K / weight.G); }
    bool panel(int64_t n, int64_t k_begin, int64_t k_end, char* words, float* scales) const {
        word_panel(weight, n, k_begin, k_end, words);
        if (weight.G > 1) PREQUANT_LEVEL::column_scales(weight, n, k_begin, scales);
        return weight.G > 1;
    }
    bool column_scales(int64_t n, float* scales) const {
        if (weight.G == 1) PREQUANT_LEVEL::column_scales(weight, n, 0, scales);
        return weight.G == 1;
    }
    bool few([[maybe_unused]] int64_t n, int64_t rows, [[maybe_unused]] const BlockRows& rounded,
             [[maybe_unused]] float* sums) const {
        if (!kHasBytes || !suits_few_tokens(rows, weight, kBlock)) return false;
#if PREQUANT_AVX512 || PREQUANT_AVX2
        multiply_few_blocks(rounded, rows, weight, n, sums);
#endif
        return true;
    }
};

inline void linear_w4a16(Matrix x, Weight weight, Outliers outliers, const float* bias, bool in_float32,
                         MutableMatrix y, Stream) {
    if (in_float32) return linear_w4a16_float(x, weight, outliers, bias, y);
    block_product(x, ForwardBlocks{weight}, OutlierSide(outliers, true, weight.K, weight.N), bias, y);
}

}  // namespace prequant::PREQUANT_LEVEL
