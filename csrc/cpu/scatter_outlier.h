// dense[:, dims] (axis 1) or dense[dims] (axis 0) = or += values, rounded to dense's type first.
//                                                                                   Meaning: reference.scatter_outlier_
#pragma once

#include "numbers.h"

namespace prequant::PREQUANT_LEVEL {

inline void scatter_outlier_(MutableMatrix dense, Outliers outliers, bool accumulate, Stream) {
    const auto write = [&](int64_t n, int64_t k, float value) {
        const int64_t i = n * dense.cols + k;
        if (accumulate) {
            float rounded = value;
            if (dense.dtype == Dtype::float16) rounded = float_from_half(half_from_float(value));
            if (dense.dtype == Dtype::bfloat16) rounded = float_from_bfloat16(bfloat16_from_float(value));
            value = load_float(dense.data, dense.dtype, i) + rounded;
        }
        store_float(value, dense.data, dense.dtype, i);
    };
    if (outliers.axis == 1) {
        parallel_for(dense.rows, outliers.r, [&](int64_t begin, int64_t end) {
            for (int64_t n = begin; n < end; ++n)
                for (int64_t j = 0; j < outliers.r; ++j)
                    write(n, outliers.dims[j], outliers.values[n * outliers.r + j]);
        });
    } else {
        constexpr int64_t kColumns = 256;  // tasks are columns: a row that dims name twice is written in order
        parallel_for(ceil_div(dense.cols, kColumns), outliers.r * kColumns, [&](int64_t begin, int64_t end) {
            for (int64_t j = 0; j < outliers.r; ++j)
                for (int64_t k = begin * kColumns; k < smaller(dense.cols, end * kColumns); ++k)
                    write(outliers.dims[j], k, outliers.values[j * dense.cols + k]);
        });
    }
}

}  // namespace prequant::PREQUANT_LEVEL
