// rows[i] = (codes[ids[i]] - zero_point) * scale in float32, then cast; one range a row of the table, or one for all.
//                                                                                          Meaning: reference.embedding
//
// Limited by the bytes of `rows`.
#pragma once

#include "numbers.h"

namespace prequant::PREQUANT_LEVEL {

inline void embedding(const int64_t* ids, const uint8_t* codes, const float* scale, const uint8_t* zero_point, int64_t,
                      bool per_row, MutableMatrix rows, Stream) {
    parallel_for(rows.rows, rows.cols / 4, [&](int64_t begin, int64_t end) {
        float values[kSpan];
        for (int64_t i = begin; i < end; ++i) {
            const int64_t block = per_row ? ids[i] : 0;
            const float step = scale[block];
            const int zero = zero_point[block];
            for (int64_t k = 0; k < rows.cols; k += kSpan) {
                const int64_t count = smaller(kSpan, rows.cols - k);
                const uint8_t* source = codes + ids[i] * rows.cols + k;
                for (int64_t j = 0; j < count; ++j) values[j] = static_cast<float>(source[j] - zero) * step;
                store_floats(values, count, rows.data, rows.dtype, i * rows.cols + k);
            }
        }
    });
}

}  // namespace prequant::PREQUANT_LEVEL
