// Blocks of the weight as float32 panels of kTileColumns columns, for the register tile of tile.h.
//
//   forward_panel    panel[k][n]: the rows' columns side by side     backward_panel    panel[n][k]: as the weight lies
#pragma once

#include "codes.h"
#include "row_words.h"
#include "tile.h"

namespace prequant::PREQUANT_LEVEL {

// panel[(k - begin) * kTileColumns + i] = weight (n + i, k), 0 for i >= rows. `codes` is scratch of count bytes.
inline void forward_panel(const Weight& weight, int64_t n, int64_t rows, int64_t begin, int64_t count, float* panel, uint8_t* codes) {
#if PREQUANT_AVX512
    const int per_word = 32 / weight.container;
    if (begin % per_word == 0) {
        // Value i of 16 rows at a time: a shift, a mask, and the arithmetic of `dequantize`.
        const __m512i mask = _mm512_set1_epi32((1 << weight.container) - 1), step = _mm512_set1_epi32(weight.container);
        const int64_t size = weight.K / weight.G;
        int64_t block_end = begin;
        __m512i zero[2];
        Vector scale[2];
        for_each_word(weight, n, rows, begin, begin + count, [&](int64_t w, __m512i words0, __m512i words1) {
            __m512i words[2] = {words0, words1};
            const int64_t k = w * per_word, k_end = smaller<int64_t>(k + per_word, count);
            for (int64_t i = k; i < k_end; ++i) {
                if (begin + i >= block_end) {
                    int32_t zeros[kTileColumns] = {};
                    float scales[kTileColumns] = {};  // 0 for missing rows: their values are 0
                    for (int64_t row = 0; row < rows; ++row) {
                        const int64_t block = weight.block(n + row, begin + i);
                        zeros[row] = weight.zero_point[block];
                        scales[row] = weight.scale ? weight.scale[block] : 1.0f;
                    }
                    for (int half = 0; half < 2; ++half) {
                        zero[half] = _mm512_loadu_si512(zeros + 16 * half);
                        scale[half] = load(scales + 16 * half);
                    }
                    block_end = weight.G == 1 ? begin + count : ((begin + i) / size + 1) * size;
                }
                for (int half = 0; half < 2; ++half) {
                    const __m512i code = _mm512_and_si512(words[half], mask);
                    words[half] = _mm512_srlv_epi32(words[half], step);
                    store(panel + i * kTileColumns + 16 * half, _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(code, zero[half])), scale[half]));
                }
            }
        });
        return;
    }
#endif
    constexpr int64_t kPiece = 64;
    float values[kPiece];
    for (int64_t k = 0; k < count; k += kPiece) {
        const int64_t width = smaller(kPiece, count - k);
        for (int64_t i = 0; i < kTileColumns; ++i) {
            if (i < rows) dequantize_codes(weight, n + i, begin + k, width, codes, values);
            for (int64_t j = 0; j < width; ++j) panel[(k + j) * kTileColumns + i] = i < rows ? values[j] : 0.0f;
        }
    }
}

#if PREQUANT_AVX512
// 16 consecutive codes from a byte boundary.
template <int Container>
inline __m512i load_16_codes(const uint8_t* bytes) {
    if constexpr (Container == 8) {
        return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
    } else if constexpr (Container == 4) {  // 8 bytes to 8 words of 64 bits, whose halves take a nibble each
        const __m512i pairs = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)));
        return _mm512_and_si512(_mm512_or_si512(pairs, _mm512_slli_epi64(pairs, 28)), _mm512_set1_epi32(15));
    } else {
        int word;
        std::memcpy(&word, bytes, sizeof word);
        const __m512i shifts = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        return _mm512_and_si512(_mm512_srlv_epi32(_mm512_set1_epi32(word), shifts), _mm512_set1_epi32(3));
    }
}

// backward_panel for whole panels whose halves lie in one block each.
template <int Container>
inline void backward_panel_by_halves(const Weight& weight, int64_t begin, int64_t count, int64_t k, float* panel) {
    const uint8_t* bytes = weight.row(begin) + k * Container / 8;
    const int64_t row_bytes = packed_row_bytes(weight.K, Container), block_step = weight.scale_rows == 1 ? 0 : weight.G;
    int64_t blocks[2] = {weight.block(begin, k), weight.block(begin, k + kLanes)};
    for (int64_t n = 0; n < count; ++n) {
        for (int half = 0; half < 2; ++half) {
            const __m512i code = load_16_codes<Container>(bytes + half * kLanes * Container / 8);
            const __m512 signed_code = _mm512_cvtepi32_ps(_mm512_sub_epi32(code, _mm512_set1_epi32(weight.zero_point[blocks[half]])));
            store(panel + half * kLanes, _mm512_mul_ps(signed_code, broadcast(weight.scale[blocks[half]])));
            blocks[half] += block_step;
        }
        bytes += row_bytes;
        panel += kTileColumns;
    }
}
#endif

// panel[(n - begin) * kTileColumns + i] = weight (n, k + i), 0 for i >= columns; k is a multiple of kTileColumns.
inline void backward_panel(const Weight& weight, int64_t begin, int64_t count, int64_t k, int64_t columns, float* panel, uint8_t* codes) {
#if PREQUANT_AVX512
    if (columns == kTileColumns && (weight.G == 1 || weight.K / weight.G % kLanes == 0)) {
        switch (weight.container) {
            case 2: return backward_panel_by_halves<2>(weight, begin, count, k, panel);
            case 4: return backward_panel_by_halves<4>(weight, begin, count, k, panel);
            default: return backward_panel_by_halves<8>(weight, begin, count, k, panel);
        }
    }
#endif
    for (int64_t n = 0; n < count; ++n) {
        float* row = panel + n * kTileColumns;
        dequantize_codes(weight, begin + n, k, columns, codes, row);
        for (int64_t i = columns; i < kTileColumns; ++i) row[i] = 0.0f;
    }
}

}  // namespace prequant::PREQUANT_LEVEL
