// Bit-packed formats: the only copy of their index arithmetic, for host and device.
//
//   canonical row, container 4        byte      0       1     ...        Element k of a row sits in the lowest free bits first;
//                                     bits    7..0    7..0               a row starts on a byte, its last byte is padded with 0 bits.
//                                     codes   1 0     3 2     ...        Container 2 holds four codes a byte, container 8 one.
//
//   prepacked panel (CPU)             word w of panel p, 64 bytes:       The 32-bit words of 16 rows side by side, so that one
//                                     row 16p | 16p+1 | ... | 16p+15     512-bit load brings 4 bytes of each of 16 rows.
//                                     bytes 4w..4w+3 of each             Missing rows and bytes are 0.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define PREQUANT_HOST_DEVICE __host__ __device__
#else
#define PREQUANT_HOST_DEVICE
#endif

namespace prequant {

// Codes are 2 to 8 bits wide; a width in between uses the next larger container.
PREQUANT_HOST_DEVICE constexpr int container_bits(int64_t bits) { return bits == 2 ? 2 : bits <= 4 ? 4 : 8; }

PREQUANT_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

PREQUANT_HOST_DEVICE constexpr int64_t packed_row_bytes(int64_t K, int container) { return ceil_div(K * container, 8); }

// Code k of a canonical row.
PREQUANT_HOST_DEVICE constexpr int code_at(const uint8_t* row, int64_t k, int container) {
    const int per_byte = 8 / container;
    return (row[k / per_byte] >> (static_cast<int>(k % per_byte) * container)) & ((1 << container) - 1);
}

constexpr int64_t kPanelRows = 16;  // rows of a prepacked panel
constexpr int64_t kWordBytes = 4;   // consecutive bytes of one row in a panel

PREQUANT_HOST_DEVICE constexpr int64_t panel_words(int64_t K, int container) { return ceil_div(packed_row_bytes(K, container), kWordBytes); }

// Where byte j of canonical row n lies in the prepacked buffer.
PREQUANT_HOST_DEVICE constexpr int64_t prepacked_index(int64_t n, int64_t j, int64_t words) {
    return ((n / kPanelRows * words + j / kWordBytes) * kPanelRows + n % kPanelRows) * kWordBytes + j % kWordBytes;
}

}  // namespace prequant
