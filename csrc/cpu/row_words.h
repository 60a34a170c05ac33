// Blocks of 16 packed rows with their 32-bit words side by side (avx512): the panel of formats.h, made in registers from canonical rows.
//
//   row n     word 0 | word 1 | ...              vector w   word w of rows n, n+1, ..., n+15
//   row n+1   word 0 | word 1 | ...      ->
#pragma once

#include "numbers.h"

#if PREQUANT_AVX512

namespace prequant::PREQUANT_LEVEL {

constexpr int kWordRows = 16;

// words[w] = bytes 4w .. 4w + 3 of `rows` (up to 16) rows, `row_bytes` apart; of each only the first `bytes` (up to 64) are read, the rest is 0.
inline void load_words(const uint8_t* first, int64_t row_bytes, int64_t rows, int64_t bytes, __m512i* words) {
    const __mmask64 mask = bytes >= 64 ? ~__mmask64{0} : (__mmask64{1} << bytes) - 1;
    __m512i a[16], b[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) a[i] = i < rows ? _mm512_maskz_loadu_epi8(mask, first + i * row_bytes) : _mm512_setzero_si512();
    // Transposes 4x4 words within 128-bit lanes, then the 4x4 lanes.
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        const __m512i low0 = _mm512_unpacklo_epi32(a[i], a[i + 1]), high0 = _mm512_unpackhi_epi32(a[i], a[i + 1]);
        const __m512i low1 = _mm512_unpacklo_epi32(a[i + 2], a[i + 3]), high1 = _mm512_unpackhi_epi32(a[i + 2], a[i + 3]);
        b[i] = _mm512_unpacklo_epi64(low0, low1);
        b[i + 1] = _mm512_unpackhi_epi64(low0, low1);
        b[i + 2] = _mm512_unpacklo_epi64(high0, high1);
        b[i + 3] = _mm512_unpackhi_epi64(high0, high1);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {  // b[i + 4j] holds, in lane l, word 4l + i of rows 4j .. 4j + 3
        const __m512i low01 = _mm512_shuffle_i32x4(b[i], b[i + 4], 0x44), high01 = _mm512_shuffle_i32x4(b[i], b[i + 4], 0xee);
        const __m512i low23 = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0x44), high23 = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0xee);
        words[i] = _mm512_shuffle_i32x4(low01, low23, 0x88);
        words[i + 4] = _mm512_shuffle_i32x4(low01, low23, 0xdd);
        words[i + 8] = _mm512_shuffle_i32x4(high01, high23, 0x88);
        words[i + 12] = _mm512_shuffle_i32x4(high01, high23, 0xdd);
    }
}

// body(w, words of rows 0 .. 15, words of rows 16 .. 31) for each word w that holds codes k_begin .. k_end of 32 rows from n; k_begin is the first code of a
// word.
template <typename Body>
inline void for_each_word(const Weight& weight, int64_t n, int64_t rows, int64_t k_begin, int64_t k_end, const Body& body) {
    const int64_t row_bytes = packed_row_bytes(weight.K, weight.container), first = k_begin * weight.container / 8;
    const int64_t bytes = ceil_div(k_end * weight.container, 8) - first;
    for (int64_t j = 0; j < bytes; j += 64) {
        __m512i words[2][16];
        for (int half = 0; half < 2; ++half) {
            const int64_t present = smaller<int64_t>(kWordRows, rows - half * kWordRows);
            load_words(weight.row(n + half * kWordRows) + first + j, row_bytes, present, bytes - j, words[half]);
        }
        for (int64_t w = 0; w < smaller<int64_t>(16, ceil_div(bytes - j, 4)); ++w) body(j / 4 + w, words[0][w], words[1][w]);
    }
}

}  // namespace prequant::PREQUANT_LEVEL

#endif
