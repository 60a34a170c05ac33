// Blocks of the weight as integer panels of kTileColumns rows, and their exact product with 8-bit activations.
//
//   avx512     quad q of the panel, two vectors:  row n: k 4q..4q+3 | row n+1: k 4q..4q+3 | ... | row n+31     signed bytes, code (container 8: code - 128)
//              vpdpbusd multiplies 4 activation codes, broadcast and unsigned, by them; the zero points come in through sums:
//              S(a - za)(w - zw) = S a w - za S w - zw S a + count za zw, exact in int32 since the left side fits
//   portable   row n: k, k+1, ... as int16 code - zero_point, and the activations likewise: plain dot products
//
// Requires   one scale and zero point a row in the block, at most kIntegerDepth deep.
// Sums in    int32, which the bound below proves enough.
#pragma once

#include "codes.h"
#include "row_words.h"
#include "tile.h"

namespace prequant::PREQUANT_LEVEL {

constexpr int64_t kIntegerDepth = 4096;
static_assert(kIntegerDepth * 255 * 255 <= INT32_MAX, "a block's products must fit int32");

struct IntegerPanel {
    int64_t depth;
    int32_t zero[kTileColumns];
#if PREQUANT_AVX512
    int32_t offset[kTileColumns];  // depth * zero - the row's sum of codes: what a unit of the activations' zero point adds
    int8_t* quads;                 // (ceil(depth / 4), kTileColumns, 4)
#else
    int16_t* rows;  // (kTileColumns, kIntegerDepth)
#endif
};

constexpr int64_t kIntegerPanelBytes = kTileColumns * kIntegerDepth * (PREQUANT_AVX512 ? 1 : 2);

#if PREQUANT_AVX512
// Any first column, code by code: for groups that begin inside a word.
inline void store_quads_by_codes(const Weight& weight, int64_t n, int64_t rows, int64_t k_begin, int64_t k_end, int8_t* quads) {
    const int shift = weight.container == 8 ? 128 : 0;
    std::memset(quads, 0, static_cast<size_t>(ceil_div(k_end - k_begin, 4) * 4 * kTileColumns));
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t k = 0; k < k_end - k_begin; ++k)
            quads[(k / 4 * kTileColumns + i) * 4 + k % 4] = static_cast<int8_t>(code_at(weight.row(n + i), k_begin + k, weight.container) - shift);
}

// The one to four quads of a word, 16 rows of them: codes to bytes in the order of k.
inline int quads_of_words(__m512i words, int container, __m512i* quads) {
    if (container == 8) {
        quads[0] = _mm512_xor_si512(words, _mm512_set1_epi8(-128));
        return 1;
    }
    if (container == 4) {
        const __m512i mask = _mm512_set1_epi8(15);
        const __m512i even = _mm512_and_si512(words, mask), odd = _mm512_and_si512(_mm512_srli_epi16(words, 4), mask);
        const __m512i first = _mm512_unpacklo_epi8(even, odd), second = _mm512_unpackhi_epi8(even, odd);  // rows 0, 1 and rows 2, 3 of each 128 bits
        quads[0] = _mm512_castps_si512(_mm512_shuffle_ps(_mm512_castsi512_ps(first), _mm512_castsi512_ps(second), 0x88));
        quads[1] = _mm512_castps_si512(_mm512_shuffle_ps(_mm512_castsi512_ps(first), _mm512_castsi512_ps(second), 0xdd));
        return 2;
    }
    for (int j = 0; j < 4; ++j) {  // byte j: four codes of 2 bits, spread over four bytes
        const __m512i byte = _mm512_and_si512(_mm512_srli_epi32(words, static_cast<unsigned>(8 * j)), _mm512_set1_epi32(255));
        const __m512i pairs = _mm512_or_si512(byte, _mm512_slli_epi32(byte, 6));
        quads[j] = _mm512_and_si512(_mm512_or_si512(pairs, _mm512_slli_epi32(pairs, 12)), _mm512_set1_epi8(3));
    }
    return 4;
}

inline void store_quads_by_words(const Weight& weight, int64_t n, int64_t rows, int64_t k_begin, int64_t k_end, int8_t* quads) {
    const int64_t depth = k_end - k_begin;
    const int per_word = 32 / weight.container;
    for_each_word(weight, n, rows, k_begin, k_end, [&](int64_t w, __m512i words0, __m512i words1) {
        __m512i spread[2][4];
        const int count = quads_of_words(words0, weight.container, spread[0]);
        quads_of_words(words1, weight.container, spread[1]);
        for (int j = 0; j < count; ++j) {
            const int64_t valid = depth - w * per_word - 4 * j;  // a word's last codes may be the next group's
            if (valid <= 0) return;
            const __m512i kept = _mm512_set1_epi32(valid >= 4 ? -1 : (1 << (8 * valid)) - 1);
            for (int half = 0; half < 2; ++half) _mm512_store_si512(quads + (w * per_word / 4 + j) * 128 + half * 64, _mm512_and_si512(spread[half][j], kept));
        }
    });
}
#endif

// Weight rows n .. n + rows, columns k_begin .. k_end of one block, into `panel` with memory of kIntegerPanelBytes; missing rows are worth 0.
inline void build_integer_panel(const Weight& weight, int64_t n, int64_t rows, int64_t k_begin, int64_t k_end, void* memory, IntegerPanel& panel) {
    panel.depth = k_end - k_begin;
#if PREQUANT_AVX512
    panel.quads = static_cast<int8_t*>(memory);
    const int shift = weight.container == 8 ? 128 : 0;  // keeps codes within int8
    if (k_begin % (32 / weight.container) == 0)
        store_quads_by_words(weight, n, rows, k_begin, k_end, panel.quads);
    else
        store_quads_by_codes(weight, n, rows, k_begin, k_end, panel.quads);
    __m512i totals[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    for (int64_t q = 0; q < ceil_div(panel.depth, 4); ++q)
        for (int v = 0; v < 2; ++v) totals[v] = _mm512_dpbusd_epi32(totals[v], _mm512_set1_epi8(1), _mm512_load_si512(panel.quads + q * 128 + v * 64));
    for (int v = 0; v < 2; ++v) _mm512_storeu_si512(panel.offset + 16 * v, totals[v]);
    for (int64_t i = 0; i < kTileColumns; ++i) {
        panel.zero[i] = i < rows ? weight.zero_point[weight.block(n + i, k_begin)] - shift : 0;
        panel.offset[i] = static_cast<int32_t>(panel.depth) * panel.zero[i] - panel.offset[i];
    }
#else
    panel.rows = static_cast<int16_t*>(memory);
    for (int64_t i = 0; i < kTileColumns; ++i) {
        int16_t* row = panel.rows + i * kIntegerDepth;
        panel.zero[i] = i < rows ? weight.zero_point[weight.block(n + i, k_begin)] : 0;
        constexpr int64_t kPiece = 512;
        uint8_t codes[kPiece] = {};
        for (int64_t k = 0; k < panel.depth; k += kPiece) {
            const int64_t count = smaller(kPiece, panel.depth - k);
            if (i < rows) unpack_codes(weight.row(n + i), k_begin + k, count, weight.container, codes);
            for (int64_t j = 0; j < count; ++j) row[k + j] = static_cast<int16_t>(codes[j] - panel.zero[i]);
        }
    }
#endif
}

#if PREQUANT_AVX512
// sum += four unsigned bytes of `codes` times four signed ones of `weights`, in each of 16 lanes: _mm512_dpbusd_epi32, whose accumulators GCC 12 copies
// to other registers and to the stack at every step.
inline void add_quads(__m512i& sum, __m512i codes, __m512i weights) { __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(weights)); }

// products[i * kTileColumns + c] for Rows rows of codes, `stride` apart, with their zero points and sums; whole quads only.
template <int Rows>
void multiply_integer_tile(const IntegerPanel& panel, const uint8_t* codes, int64_t stride, const int32_t* zero_points, const int32_t* sums,
                           int32_t* products) {
    __m512i totals[Rows][2];  // every loop over Rows is unrolled, so that they are registers
#pragma GCC unroll 12
    for (int i = 0; i < Rows; ++i) totals[i][0] = totals[i][1] = _mm512_setzero_si512();
    constexpr int kPointers = (Rows + 2) / 3;  // as in tile.h
    const uint8_t* rows[kPointers];
    for (int i = 0; i < kPointers; ++i) rows[i] = codes + 3 * i * stride;
    const int8_t* quad = panel.quads;
    for (int64_t q = panel.depth / 4; q > 0; --q) {
        const __m512i w0 = _mm512_load_si512(quad), w1 = _mm512_load_si512(quad + 64);
        quad += 128;
#pragma GCC unroll 12
        for (int i = 0; i < Rows; ++i) {
            int four_codes;
            std::memcpy(&four_codes, rows[i / 3] + i % 3 * stride, 4);
            const __m512i a = _mm512_set1_epi32(four_codes);
            add_quads(totals[i][0], a, w0);
            add_quads(totals[i][1], a, w1);
        }
        for (int i = 0; i < kPointers; ++i) rows[i] += 4;
    }
#pragma GCC unroll 12
    for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) {
            const __m512i zero = _mm512_loadu_si512(panel.zero + 16 * v), offset = _mm512_loadu_si512(panel.offset + 16 * v);
            const __m512i added = _mm512_mullo_epi32(_mm512_set1_epi32(zero_points[i]), offset);
            const __m512i removed = _mm512_mullo_epi32(_mm512_set1_epi32(sums[i]), zero);
            _mm512_storeu_si512(products + i * kTileColumns + 16 * v, _mm512_sub_epi32(_mm512_add_epi32(totals[i][v], added), removed));
        }
}

// Adds the last depth % 4 codes of each row, which a load of four could read past the tensor's end.
inline void multiply_integer_rest(const IntegerPanel& panel, int64_t rows, const uint8_t* codes, int64_t stride, int32_t* products) {
    for (int64_t k = panel.depth / 4 * 4; k < panel.depth; ++k)
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t c = 0; c < kTileColumns; ++c)
                products[i * kTileColumns + c] += codes[i * stride + k] * panel.quads[(k / 4 * kTileColumns + c) * 4 + k % 4];
}

inline void multiply_integer_panel(const IntegerPanel& panel, int64_t rows, const uint8_t* codes, int64_t stride, const int32_t* zero_points,
                                   const int32_t* sums, int32_t* products) {
    using Multiply = void (*)(const IntegerPanel&, const uint8_t*, int64_t, const int32_t*, const int32_t*, int32_t*);
    static constexpr Multiply kByRows[] = {nullptr,
                                           multiply_integer_tile<1>,
                                           multiply_integer_tile<2>,
                                           multiply_integer_tile<3>,
                                           multiply_integer_tile<4>,
                                           multiply_integer_tile<5>,
                                           multiply_integer_tile<6>,
                                           multiply_integer_tile<7>,
                                           multiply_integer_tile<8>,
                                           multiply_integer_tile<9>,
                                           multiply_integer_tile<10>,
                                           multiply_integer_tile<11>,
                                           multiply_integer_tile<12>};
    kByRows[rows](panel, codes, stride, zero_points, sums, products);
    if (panel.depth % 4) multiply_integer_rest(panel, rows, codes, stride, products);
}
#else
inline void multiply_integer_panel(const IntegerPanel& panel, int64_t rows, const uint8_t* codes, int64_t stride, const int32_t* zero_points, const int32_t*,
                                   int32_t* products) {
    int16_t row[kIntegerDepth];
    for (int64_t i = 0; i < rows; ++i) {
        const int zero = zero_points[i];
        for (int64_t k = 0; k < panel.depth; ++k) row[k] = static_cast<int16_t>(codes[i * stride + k] - zero);
        for (int64_t c = 0; c < kTileColumns; c += 4) {
            const int16_t* w = panel.rows + c * kIntegerDepth;
            int32_t s0 = 0, s1 = 0, s2 = 0, s3 = 0;
            for (int64_t k = 0; k < panel.depth; ++k) {
                s0 += row[k] * w[k];
                s1 += row[k] * w[k + kIntegerDepth];
                s2 += row[k] * w[k + 2 * kIntegerDepth];
                s3 += row[k] * w[k + 3 * kIntegerDepth];
            }
            int32_t* out = products + i * kTileColumns + c;
            out[0] = s0, out[1] = s1, out[2] = s2, out[3] = s3;
        }
    }
}
#endif

}  // namespace prequant::PREQUANT_LEVEL
