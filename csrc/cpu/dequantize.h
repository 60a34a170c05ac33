// dense[n] = (code - zero_point) * scale of rows row_begin .., in float32, then cast.     Meaning: reference.dequantize
//
// Limited by the bytes of `dense`.
#pragma once

#include "codes.h"

namespace prequant::PREQUANT_LEVEL {

inline void dequantize(Weight weight, int64_t row_begin, MutableMatrix dense, Stream) {
    parallel_for(dense.rows, weight.K / 4, [&](int64_t begin, int64_t end) {
        uint8_t codes[kSpan];
        float values[kSpan];
        for (int64_t n = begin; n < end; ++n)
            for (int64_t k = 0; k < weight.K; k += kSpan) {
                const int64_t count = smaller(kSpan, weight.K - k);
                dequantize_codes(weight, row_begin + n, k, count, codes, values);
                store_floats(values, count, dense.data, dense.dtype, n * weight.K + k);
            }
    });
}

}  // namespace prequant::PREQUANT_LEVEL
