// Bit-packed formats: the only copy of their index arithmetic, for host and device.
//
//   canonical row, container 4      byte     0      1    ...     Element k of a row sits in the lowest free bits first;
//                                   bits   7..0   7..0           a row starts on a byte, its last byte is padded with
//                                   codes  1 0    3 2    ...     0 bits. Container 2 holds four codes a byte,
//                                                                container 8 one.
//
//   prepacked panel (CPU)           word w of panel p, 64 bytes:      Words of 32 bits of 16 rows side by side: one
//                                   row 16p | 16p+1 | ... | 16p+15    512-bit load brings the next 32 / container codes
//                                   4 bytes of each                   of each of 16 rows. Code i of a word lies in byte
//                                                                     i % 4 at bit container * (i / 4): a shift and a
//                                   after the last word 16 int32:     mask bring four consecutive codes as four bytes,
//                                   the sum of each row's codes       or every other one as two int16. Missing rows and
//                                                                     codes are 0.
//
//   tensor-core chunk (CUDA)       16 rows (n) x 64 columns (k), kept lane by lane: lane 4g + t of a warp holds 32
//                                  codes, at 4 bits 16 bytes, one 128-bit load. Its code i, from the lowest bits up, is
//
//                                      i = 8 j + 4 s + 2 kk + nn           n = g + 8 nn,  k = 16 j + 8 kk + 2 t + s
//
//                                  so word j of a lane (4 bits) is its part of the 16 x 16 tile j, and the two codes of
//                                  one register of an mma operand, s = 0 and s = 1, are 16 bits apart. Missing rows and
//                                  columns are 0. Chunks of 16 rows lie side by side along k:
//                                  chunk (n / 16, k / 64) is number n / 16 * ceil(K / 64) + k / 64.
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
constexpr int64_t kPanelBytes = 64;  // of one word, or sum, of each of them

PREQUANT_HOST_DEVICE constexpr int word_codes(int container) { return 32 / container; }
PREQUANT_HOST_DEVICE constexpr int64_t panel_words(int64_t K, int container) {
    return ceil_div(K, word_codes(container));
}
// Of code i of a word.
PREQUANT_HOST_DEVICE constexpr int word_shift(int i, int container) { return 8 * (i % 4) + container * (i / 4); }

// Where word k / word_codes of row n lies in the prepacked buffer.
PREQUANT_HOST_DEVICE constexpr int64_t panel_offset(int64_t n, int64_t word, int64_t words) {
    return ((n / kPanelRows) * (words + 1) + word) * kPanelBytes + n % kPanelRows * 4;
}

constexpr int64_t kChunkRows = 16, kChunkColumns = 64;
constexpr int kWarp = 32;  // lanes of a warp, each of which keeps a part of a chunk
constexpr int kLaneCodes = 32;  // codes of that part

PREQUANT_HOST_DEVICE constexpr int64_t chunks_along(int64_t K) { return ceil_div(K, kChunkColumns); }
PREQUANT_HOST_DEVICE constexpr int64_t lane_bytes(int container) { return kLaneCodes * container / 8; }
PREQUANT_HOST_DEVICE constexpr int64_t chunk_bytes(int container) { return kWarp * lane_bytes(container); }

// Where weight (n, k) lies, n and k within a chunk: which lane has it, and which of the lane's codes it is.
PREQUANT_HOST_DEVICE constexpr int chunk_lane(int n, int k) { return n % 8 * 4 + k % 8 / 2; }
PREQUANT_HOST_DEVICE constexpr int chunk_code(int n, int k) { return k / 16 * 8 + k % 2 * 4 + k / 8 % 2 * 2 + n / 8; }

// The inverse: row and column of code i of a lane.
PREQUANT_HOST_DEVICE constexpr int chunk_row(int lane, int i) { return lane / 4 + i % 2 * 8; }
PREQUANT_HOST_DEVICE constexpr int chunk_column(int lane, int i) {
    return i / 8 * 16 + i / 2 % 2 * 8 + lane % 4 * 2 + i / 4 % 2;
}

}  // namespace prequant
