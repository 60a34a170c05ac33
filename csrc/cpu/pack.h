// codes (N, K), a byte each <-> the canonical rows of formats.h.                        Meaning: reference.pack, unpack
//
// Limited by the bytes moved.
#pragma once

#include "codes.h"

namespace prequant::PREQUANT_LEVEL {

inline void pack(const uint8_t* codes, int64_t N, int64_t K, int container, uint8_t* packed, Stream) {
    const int64_t row_bytes = packed_row_bytes(K, container);
    parallel_for(N, K / 8, [&](int64_t begin, int64_t end) {
        for (int64_t n = begin; n < end; ++n) pack_codes(codes + n * K, 0, K, container, packed + n * row_bytes);
    });
}

inline void unpack(const uint8_t* packed, int64_t N, int64_t K, int container, uint8_t* codes, Stream) {
    const int64_t row_bytes = packed_row_bytes(K, container);
    parallel_for(N, K / 8, [&](int64_t begin, int64_t end) {
        for (int64_t n = begin; n < end; ++n) unpack_codes(packed + n * row_bytes, 0, K, container, codes + n * K);
    });
}

}  // namespace prequant::PREQUANT_LEVEL
