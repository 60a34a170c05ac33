// The outlier term of a product of integers. It is float32 on every path: either a few columns of the input times a
// few rows of values, added to every tile, or whole columns of the result, made beforehand and added where they belong.
//
//              columns of x, gathered: side (M, r)        whole columns of the result: side (M, r)
//   forward    axis 1:  y += x̂[:, idx] O^T                axis 0:  y[:, idx] += x̂ O^T
//   backward   axis 0:  dx += dy[:, idx] O                axis 1:  dx[:, idx] += dy O
//
// Sums in    float32.
#pragma once

#include "activation_rows.h"
#include "integer_tile.h"
#include "tile.h"

namespace prequant::PREQUANT_LEVEL {

constexpr int64_t kSpreadDepth = 128;  // outliers whose values are put into one panel

class OutlierSide {
   public:
    OutlierSide(const Outliers& outliers, bool is_forward, int64_t depth, int64_t columns)
        : outliers_(outliers),
          is_forward_(is_forward),
          is_spread_((outliers.axis == 1) == is_forward),
          depth_(depth),
          columns_(columns) {}

    int64_t r() const { return outliers_.r; }
    // Of the side for so many rows, and (below) of scratch for `add`.
    int64_t side_bytes(int64_t rows) const { return rows * outliers_.r * static_cast<int64_t>(sizeof(float)); }
    static constexpr int64_t kScratchBytes = kSpreadDepth * kPanelColumns * static_cast<int64_t>(sizeof(float));

    // side: rows m .. m + rows of the side. The input has `depth` columns.
    void prepare(const ActivationRows& input, int64_t m, int64_t rows, float* side) const {
        const int64_t r = outliers_.r;
        if (r == 0) return;
        if (is_spread_) return gather_columns(input, m, rows, outliers_.dims, r, side);
        if (is_forward_) return multiply_rows(input, m, rows, outliers_.values, depth_, r, side, r);
        const Buffer buffer(kDotOutliers * depth_ * static_cast<int64_t>(sizeof(float)));  // a few columns of O as rows
        float* const transposed = static_cast<float*>(buffer.data());
        for (int64_t j = 0; j < r; j += kDotOutliers) {
            const int64_t count = smaller<int64_t>(kDotOutliers, r - j);
            for (int64_t n = 0; n < depth_; ++n)
                for (int64_t i = 0; i < count; ++i) transposed[i * depth_ + n] = outliers_.values[n * r + j + i];
            multiply_rows(input, m, rows, transposed, depth_, count, side + j, r);
        }
    }

    // Adds to sums (rows, kPanelColumns), columns `first` .. first + kPanelColumns of the result; `side` begins with
    // the tile's first row.
    void add(int64_t rows, int64_t first, const float* side, float* scratch, float* sums) const {
        const int64_t r = outliers_.r, width = smaller<int64_t>(kPanelColumns, columns_ - first);
        if (!is_spread_) {
            for (int64_t j = 0; j < r; ++j) {
                const int64_t c = outliers_.dims[j] - first;
                for (int64_t i = 0; c >= 0 && c < width && i < rows; ++i)
                    sums[i * kPanelColumns + c] += side[i * r + j];
            }
            return;
        }
        for (int64_t j0 = 0; j0 < r; j0 += kSpreadDepth) {
            const int64_t count = smaller(kSpreadDepth, r - j0);
            for (int64_t j = 0; j < count; ++j)
                for (int64_t c = 0; c < kPanelColumns; ++c)
                    scratch[j * kPanelColumns + c] = c >= width    ? 0.0f
                                                     : is_forward_ ? outliers_.values[(first + c) * r + j0 + j]
                                                                   : outliers_.values[(j0 + j) * columns_ + first + c];
            for (int64_t c = 0; c < kPanelColumns; c += kTileColumns)
                multiply_panel<false>(rows, count, side + j0, r, scratch + c, kPanelColumns, sums + c, kPanelColumns);
        }
    }

   private:
    Outliers outliers_;
    bool is_forward_, is_spread_;
    int64_t depth_, columns_;
};

}  // namespace prequant::PREQUANT_LEVEL
