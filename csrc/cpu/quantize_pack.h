// code = clip(rint(w / scale) + zero_point, 0, 2^bits - 1), packed; outlier dimensions get zero_point, worth exactly 0.
//                                                                                      Meaning: reference.quantize_pack
//
// Requires   a finite w, a scale of at least 2^-126.
// Computes   a true float32 division, half to even: every device makes the same bytes.
// Limited by one read of the weight.
#pragma once

#include "codes.h"

namespace prequant::PREQUANT_LEVEL {

inline void quantize_pack(Matrix weight, const float* scale, const uint8_t* zero_point, int64_t scale_rows, int64_t G,
                          int bits, const int64_t* outlier_dims, int64_t r, int axis, uint8_t* packed, Stream) {
    const int64_t N = weight.rows, K = weight.cols;
    const int container = container_bits(bits);
    const int64_t row_bytes = packed_row_bytes(K, container);
    const float top = static_cast<float>((1 << bits) - 1);
    parallel_for(N, K, [&](int64_t row_begin, int64_t row_end) {
        float scratch[kSpan];
        uint8_t codes[kSpan];
        for (int64_t n = row_begin; n < row_end; ++n) {
            bool is_outlier_row = false;
            for (int64_t j = 0; axis == 0 && j < r; ++j) is_outlier_row |= outlier_dims[j] == n;
            for (int64_t k0 = 0; k0 < K; k0 += kSpan) {
                const int64_t count = smaller(kSpan, K - k0);
                const float* row = as_floats(weight.data, weight.dtype, n * K + k0, count, scratch);
                for_each_block(n, k0, k0 + count, K, scale_rows, G, [&](int64_t begin, int64_t end, int64_t block) {
                    const float step = scale[block], zero = zero_point[block];
                    if (is_outlier_row) {
                        std::memset(codes + (begin - k0), zero_point[block], static_cast<size_t>(end - begin));
                        return;
                    }
                    for (int64_t i = begin - k0; i < end - k0; ++i) {
                        // Clipped beyond every code, within reach of round_even.
                        const float ratio = larger(-1024.0f, smaller(1024.0f, row[i] / step));
                        codes[i] = static_cast<uint8_t>(
                            static_cast<int>(larger(0.0f, smaller(top, round_even(ratio) + zero))));
                    }
                });
                for (int64_t j = 0; axis == 1 && j < r; ++j) {
                    const int64_t k = outlier_dims[j];
                    if (k >= k0 && k < k0 + count)
                        codes[k - k0] = zero_point[(scale_rows == 1 ? 0 : n) * G + k / (K / G)];
                }
                pack_codes(codes, k0, count, container, packed + n * row_bytes);
            }
        }
    });
}

}  // namespace prequant::PREQUANT_LEVEL
