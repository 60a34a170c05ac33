// Outliers |w - mean| > threshold * std and their clipping energy, for each column and each row.
//                                                                                     Meaning: reference.outlier_counts
//
// Sums in    int64 that saturates. A sum of such numbers does not depend on its order, so rows are split over threads
//            as they come.
// Limited by one read of the weight.
#pragma once

#include "numbers.h"

namespace prequant::PREQUANT_LEVEL {

// Not memset, which no null pointer may be given to: an empty matrix has one.
inline void clear(int64_t* values, int64_t count) {
    for (int64_t i = 0; i < count; ++i) values[i] = 0;
}

inline void outlier_counts(Matrix weight, const double* mean, const double* std, double threshold,
                           int64_t* column_counts, int64_t* column_energy, int64_t* row_counts, int64_t* row_energy,
                           Stream) {
    const int64_t N = weight.rows, K = weight.cols;
    const double center = *mean, sigma = *std, limit = threshold * sigma;

    const auto count_rows = [&](int64_t row_begin, int64_t row_end, int64_t* counts, int64_t* energies) {
        float scratch[kSpan];
        for (int64_t n = row_begin; n < row_end; ++n) {
            row_counts[n] = row_energy[n] = 0;
            for (int64_t k0 = 0; k0 < K; k0 += kSpan) {
                const int64_t count = smaller(kSpan, K - k0);
                const float* row = as_floats(weight.data, weight.dtype, n * K + k0, count, scratch);
                constexpr int64_t kRun = 64;  // outliers are rare: a run without one is passed over at full speed
                for (int64_t i0 = 0; i0 < count; i0 += kRun) {
                    const int64_t i1 = smaller(count, i0 + kRun);
                    int any = 0;
                    for (int64_t i = i0; i < i1; ++i)
                        any |= __builtin_fabs(static_cast<double>(row[i]) - center) > limit;
                    if (!any) continue;
                    for (int64_t i = i0; i < i1; ++i) {
                        const double deviation = __builtin_fabs(static_cast<double>(row[i]) - center);
                        if (!(deviation > limit)) continue;
                        const double excess = (deviation - limit) / sigma,
                                     units = __builtin_rint(excess * excess * kEnergyUnits);
                        const int64_t energy = units >= 0x1p63 ? INT64_MAX : static_cast<int64_t>(units);
                        counts[k0 + i] += 1;
                        energies[k0 + i] = saturating_add(energies[k0 + i], energy);
                        row_counts[n] += 1;
                        row_energy[n] = saturating_add(row_energy[n], energy);
                    }
                }
            }
        }
    };

    clear(column_counts, K);
    clear(column_energy, K);
    if (!(sigma > 0)) {
        clear(row_counts, N);
        clear(row_energy, N);
        return;
    }
    const int64_t parts = smaller(num_threads(), ceil_div(N, 16));
    if (parts <= 1) return count_rows(0, N, column_counts, column_energy);
    const Buffer partial(parts * 2 * K * static_cast<int64_t>(sizeof(int64_t)));
    int64_t* sums = static_cast<int64_t*>(partial.data());
    parallel_for(parts, N / parts * K, [&](int64_t begin, int64_t end) {
        for (int64_t part = begin; part < end; ++part) {
            int64_t* own = sums + part * 2 * K;
            clear(own, 2 * K);
            count_rows(N * part / parts, N * (part + 1) / parts, own, own + K);
        }
    });
    for (int64_t part = 0; part < parts; ++part)
        for (int64_t k = 0; k < K; ++k) {
            column_counts[k] += sums[part * 2 * K + k];
            column_energy[k] = saturating_add(column_energy[k], sums[part * 2 * K + K + k]);
        }
}

}  // namespace prequant::PREQUANT_LEVEL
