// Rows and columns of the activations as float32, whether they came as floats or as codes.
#pragma once

#include "numbers.h"

namespace prequant::PREQUANT_LEVEL {

// x̂ (M, K): `floats` where its data is set, the codes otherwise.
struct ActivationRows {
    Matrix floats;
    Activations codes;

    bool has_floats() const { return floats.data != nullptr; }
    // The one that is not set has no columns; an empty one's data is null too.
    int64_t columns() const { return larger(floats.cols, codes.K); }
    int64_t token(int64_t m) const { return codes.per_token ? m : 0; }

    // Columns k .. k + count of row m; a pointer into the data itself where that is float32.
    const float* load(int64_t m, int64_t k, int64_t count, float* scratch) const {
        if (has_floats()) return as_floats(floats.data, floats.dtype, m * floats.cols + k, count, scratch);
        const uint8_t* row = codes.codes + m * codes.K + k;
        const float scale = codes.scale[token(m)];
        const int zero = codes.zero_point[token(m)];
        for (int64_t i = 0; i < count; ++i) scratch[i] = static_cast<float>(row[i] - zero) * scale;
        return scratch;
    }

    float at(int64_t m, int64_t k) const {
        if (has_floats()) return load_float(floats.data, floats.dtype, m * floats.cols + k);
        return static_cast<float>(codes.codes[m * codes.K + k] - codes.zero_point[token(m)]) * codes.scale[token(m)];
    }
};

// The matrices (M, r) that are added to a product are kept for so many rows at a time: 1 MiB, or one block of rows.
inline int64_t side_rows(int64_t r, int64_t block) {
    return larger<int64_t>(1, (int64_t{1} << 18) / larger<int64_t>(1, r) / block) * block;
}

// side[i * r + j] = x̂[m + i, dims[j]]
inline void gather_columns(const ActivationRows& x, int64_t m, int64_t rows, const int64_t* dims, int64_t r,
                           float* side) {
    parallel_for(rows, 2 * r, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
            for (int64_t j = 0; j < r; ++j) side[i * r + j] = x.at(m + i, dims[j]);
    });
}

constexpr int kDotRows = 4, kDotOutliers = 5;

// out[i * out_stride + j] = sum over k of a[i][k] b[j][k]: Outliers rows of b against kDotRows rows of a, along vectors
// of k.
template <int Outliers>
void dot_tile(int64_t count, const float* const* a, const float* b, int64_t b_stride, float* out, int64_t out_stride) {
    Vector sums[kDotRows][Outliers];
    float rest[kDotRows][Outliers] = {};
    for (int i = 0; i < kDotRows; ++i)
        for (int j = 0; j < Outliers; ++j) sums[i][j] = broadcast(0.0f);
    int64_t k = 0;
    for (; k + kLanes <= count; k += kLanes) {
        Vector x[kDotRows];
        for (int i = 0; i < kDotRows; ++i) x[i] = load(a[i] + k);
        for (int j = 0; j < Outliers; ++j) {
            const Vector w = load(b + j * b_stride + k);
            for (int i = 0; i < kDotRows; ++i) sums[i][j] = multiply_add(x[i], w, sums[i][j]);
        }
    }
    for (; k < count; ++k)
        for (int i = 0; i < kDotRows; ++i)
            for (int j = 0; j < Outliers; ++j) rest[i][j] += a[i][k] * b[j * b_stride + k];
    for (int i = 0; i < kDotRows; ++i)
        for (int j = 0; j < Outliers; ++j) out[i * out_stride + j] += sum_lanes(sums[i][j]) + rest[i][j];
}

// side[i * stride + j] = sum over k of x̂[m + i, k] values[j * K + k], j below r
inline void multiply_rows(const ActivationRows& x, int64_t m, int64_t rows, const float* values, int64_t K, int64_t r,
                          float* side, int64_t stride) {
    constexpr int64_t kDotSpan = 1024;  // columns of x at a time
    using Dot = void (*)(int64_t, const float* const*, const float*, int64_t, float*, int64_t);
    static constexpr Dot kByOutliers[] = {nullptr, dot_tile<1>, dot_tile<2>, dot_tile<3>, dot_tile<4>, dot_tile<5>};
    static_assert(sizeof kByOutliers / sizeof kByOutliers[0] == kDotOutliers + 1);
    parallel_for(ceil_div(rows, kDotRows), kDotRows * K * (r + 4) / 16, [&](int64_t begin, int64_t end) {
        float scratch[kDotRows][kDotSpan];
        for (int64_t block = begin; block < end; ++block) {
            const int64_t first = block * kDotRows, height = smaller<int64_t>(kDotRows, rows - first);
            for (int64_t j = 0; j < r; j += kDotOutliers) {
                const int64_t width = smaller<int64_t>(kDotOutliers, r - j);
                float out[kDotRows * kDotOutliers] = {};
                for (int64_t k = 0; k < K; k += kDotSpan) {
                    const int64_t count = smaller(kDotSpan, K - k);
                    const float* a[kDotRows];
                    for (int i = 0; i < kDotRows; ++i)
                        a[i] = x.load(m + first + smaller<int64_t>(i, height - 1), k, count, scratch[i]);
                    kByOutliers[width](count, a, values + j * K + k, K, out, kDotOutliers);
                }
                for (int64_t i = 0; i < height; ++i)
                    for (int64_t c = 0; c < width; ++c) side[(first + i) * stride + j + c] = out[i * kDotOutliers + c];
            }
        }
    });
}

}  // namespace prequant::PREQUANT_LEVEL
