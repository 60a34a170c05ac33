// Canonical rows <-> panels of 16 rows whose 32-bit words lie side by side (formats.h draws both).       Meaning: reference.prepack, unprepack
//
// Limited by the bytes moved.
#pragma once

#include "numbers.h"

namespace prequant::PREQUANT_LEVEL {

inline void prepack(const uint8_t* packed, int64_t N, int64_t K, int container, uint8_t* prepacked, Stream) {
    const int64_t row_bytes = packed_row_bytes(K, container), words = panel_words(K, container);
    parallel_for(ceil_div(N, kPanelRows), kPanelRows * words, [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; ++p) {
            std::memset(prepacked + prepacked_index(p * kPanelRows, 0, words), 0, static_cast<size_t>(words * kPanelRows * kWordBytes));
            for (int64_t n = p * kPanelRows; n < smaller(N, (p + 1) * kPanelRows); ++n)
                for (int64_t j = 0; j < row_bytes; j += kWordBytes)
                    std::memcpy(prepacked + prepacked_index(n, j, words), packed + n * row_bytes + j, static_cast<size_t>(smaller(kWordBytes, row_bytes - j)));
        }
    });
}

inline void unprepack(const uint8_t* prepacked, int64_t N, int64_t K, int container, uint8_t* packed, Stream) {
    const int64_t row_bytes = packed_row_bytes(K, container), words = panel_words(K, container);
    parallel_for(N, words, [&](int64_t begin, int64_t end) {
        for (int64_t n = begin; n < end; ++n)
            for (int64_t j = 0; j < row_bytes; j += kWordBytes)
                std::memcpy(packed + n * row_bytes + j, prepacked + prepacked_index(n, j, words), static_cast<size_t>(smaller(kWordBytes, row_bytes - j)));
    });
}

}  // namespace prequant::PREQUANT_LEVEL
