// What the outlier dimensions add to a product, and the second pass of a product that was split along K.    outliers.cu
//
//   axis 1   y[m, n] += sum over j of x[m, dims[j]] values[n, j]       columns of x, gathered where they are needed
//   axis 0   y[m, dims[j]] += side[m, j],  side = x values^T           r more rows of the weight: one skinny product
//                                                                      beforehand
#pragma once

#include "portable.cuh"

namespace prequant::cuda {

// The activations of a product: floats, or codes with their scale; the other one's data is null.
struct Source {
    Matrix floats{nullptr, Dtype::float32, 0, 0};
    Activations codes{};

    // The one that is not set has no rows; an empty one's data is null too.
    PREQUANT_HOST_DEVICE int64_t rows() const { return floats.rows > codes.M ? floats.rows : codes.M; }
    PREQUANT_HOST_DEVICE int64_t cols() const { return floats.cols > codes.K ? floats.cols : codes.K; }
    PREQUANT_HOST_DEVICE bool has_codes() const { return codes.codes != nullptr; }
    // The token whose scale and zero point row m has.
    PREQUANT_HOST_DEVICE int64_t token(int64_t m) const { return codes.per_token ? m : 0; }
};

// Element `index` of floats of any dtype: for gathers, where a branch costs less than the load.
PREQUANT_HOST_DEVICE inline float float_at(const void* data, Dtype dtype, int64_t index) {
    switch (dtype) {
        case Dtype::float16: return to_float(static_cast<const __half*>(data)[index]);
        case Dtype::bfloat16: return to_float(static_cast<const __nv_bfloat16*>(data)[index]);
        default: return static_cast<const float*>(data)[index];
    }
}

// x[m, k] in float32.
PREQUANT_HOST_DEVICE inline float value_at(const Source& x, int64_t m, int64_t k) {
    if (!x.has_codes()) return float_at(x.floats.data, x.floats.dtype, m * x.floats.cols + k);
    const int64_t token = x.token(m);
    return static_cast<float>(x.codes.codes[m * x.codes.K + k] - x.codes.zero_point[token]) * x.codes.scale[token];
}

// Byte i of a word of codes as kCodeBias + code, exactly: one byte permutation instead of a conversion, which runs at a
// quarter of the rate.
__device__ inline float biased_code(uint32_t word, int i) {
    return __uint_as_float(__byte_perm(word, kCodeBiasBits, 0x7440u | static_cast<uint32_t>(i)));
}

// side (M, r) float32 = x values^T for outliers of axis 0. Sums in float32, in a fixed order.
void outlier_side(const Source& x, const Outliers& outliers, float* side, Stream stream);

// y[m, n] = cast(sum over s = 0, 1, ... of partial[s][m][n], then the outliers, then bias[n]). side: of axis 0, else
// null. bias: (N) or null.
void finish(const float* partial, int splits, const Source& x, const Outliers& outliers, const float* side,
            const float* bias, MutableMatrix y, Stream stream);

}  // namespace prequant::cuda
