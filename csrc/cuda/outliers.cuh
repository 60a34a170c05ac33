// What the outlier dimensions add to a product, and the second pass of a product that was split along K.    outliers.cu
//
//   axis 1   y[m, n] += sum over j of x[m, dims[j]] values[n, j]          columns of x, gathered where they are needed
//   axis 0   y[m, dims[j]] += side[m, j],  side = x values^T              r more rows of the weight: one skinny product beforehand
#pragma once

#include "portable.cuh"

namespace prequant::cuda {

// The activations of a product: floats, or codes with their scale; the other one's data is null.
struct Source {
    Matrix floats;
    Activations codes;

    int64_t rows() const { return codes.codes != nullptr ? codes.M : floats.rows; }
    int64_t cols() const { return codes.codes != nullptr ? codes.K : floats.cols; }
};

// side (M, r) float32 = x values^T for outliers of axis 0. Sums in float32, in a fixed order.
void outlier_side(const Source& x, const Outliers& outliers, float* side, Stream stream);

// y[m, n] = cast(sum over s = 0, 1, ... of partial[s][m][n], then the outliers, then bias[n]). side: of axis 0, else null. bias: (N) or null.
void finish(const float* partial, int splits, const Source& x, const Outliers& outliers, const float* side, const float* bias, MutableMatrix y, Stream stream);

}  // namespace prequant::cuda
