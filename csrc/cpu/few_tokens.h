// The integer product of a few tokens straight from canonical rows: no panel, each packed byte is loaded once and unpacked in registers (avx512, 4 bits).
//
//   row n of weight_packed    64 bytes = 128 codes, a line: low nibbles k = 0 2 4 ..., high nibbles k = 1 3 5 ...
//   a token's codes           the same order, made once a call: 64 even ones | 64 odd ones, as code - 128, zero beyond K
//   one row of ones           below the tokens: its products are the sums of the weight's codes, which the zero points need
//
//     S(a - za)(w - zw) = S s w - zw S s + (128 - za)(S w - K zw)        s = a - 128
//
// Sums in    int32, exact: the bound below.
// Limited by loading the codes; in cache by 5 + 2 M instructions a line.
#pragma once

#include "tile.h"

#if PREQUANT_AVX512

namespace prequant::PREQUANT_LEVEL {

constexpr int64_t kFewTokens = 8, kLineBytes = 64, kLineCodes = 2 * kLineBytes;
constexpr int64_t kFewTokensDepth = 131072;
static_assert(kFewTokensDepth * 15 * 255 <= INT32_MAX, "the terms of the product and their differences must fit int32");

inline bool suits_few_tokens(const Activations& x, const Weight& weight) {
    return x.M <= kFewTokens && weight.container == 4 && weight.G == 1 && weight.K <= kFewTokensDepth;
}

inline int64_t line_count(int64_t K) { return ceil_div(K, kLineCodes); }

// (M + 1, lines, 128) signed bytes: the tokens, then the ones.
inline void arrange_tokens(const Activations& x, int8_t* lines) {
    const int64_t count = line_count(x.K);
    std::memset(lines, 0, static_cast<size_t>((x.M + 1) * count * kLineCodes));
    for (int64_t m = 0; m <= x.M; ++m) {
        int8_t* line = lines + m * count * kLineCodes;
        const uint8_t* codes = x.codes + m * x.K;
        for (int64_t k = 0; k < x.K; ++k)
            line[k / kLineCodes * kLineCodes + k % 2 * kLineBytes + k % kLineCodes / 2] = static_cast<int8_t>(m < x.M ? codes[k] - 128 : 1);
    }
}

// Lane i of the result is the sum of the lanes of sums[i]: 16 vectors, halved together.
inline __m512i sum_each(__m512i* sums) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i)  // quarters of 128 bits: i i i+8 i+8
        sums[i] = _mm512_add_epi32(_mm512_shuffle_i32x4(sums[i], sums[i + 8], 0x44), _mm512_shuffle_i32x4(sums[i], sums[i + 8], 0xee));
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)  // i i+8 i+4 i+12
        sums[i] = _mm512_add_epi32(_mm512_shuffle_i32x4(sums[i], sums[i + 4], 0x88), _mm512_shuffle_i32x4(sums[i], sums[i + 4], 0xdd));
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i)  // within a quarter: i i i+2 i+2
        sums[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(sums[i], sums[i + 2]), _mm512_unpackhi_epi64(sums[i], sums[i + 2]));
    const __m512 a = _mm512_castsi512_ps(sums[0]), b = _mm512_castsi512_ps(sums[1]);  // i i+2 i+1 i+3
    const __m512i mixed = _mm512_add_epi32(_mm512_castps_si512(_mm512_shuffle_ps(a, b, 0x88)), _mm512_castps_si512(_mm512_shuffle_ps(a, b, 0xdd)));
    return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15), mixed);
}

// sum += four unsigned bytes of `codes` times four signed ones of the token's line: see add_quads for why in assembly.
inline void add_line(__m512i& sum, __m512i codes, const int8_t* line) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "m"(*reinterpret_cast<const __m512i*>(line)));
}

// products[i * kTileColumns + c] = S tokens[i] weight[c] over a line's count of codes, for Tokens rows and Columns weight rows from `first` on.
template <int Tokens, int Columns>
void multiply_lines(const int8_t* tokens, int64_t lines, const uint8_t* first, int64_t row_bytes, int32_t* products) {
    constexpr int kSums = Tokens * Columns;
    __m512i sums[(kSums + 15) / 16 * 16];
#pragma GCC unroll 32
    for (__m512i& sum : sums) sum = _mm512_setzero_si512();
    const __m512i mask = _mm512_set1_epi8(15);
    const auto line = [&](int64_t l, __mmask64 present) {
#pragma GCC unroll 8
        for (int c = 0; c < Columns; ++c) {
            const __m512i codes = _mm512_maskz_loadu_epi8(present, first + c * row_bytes + l * kLineBytes);
            const __m512i even = _mm512_and_si512(codes, mask), odd = _mm512_and_si512(_mm512_srli_epi16(codes, 4), mask);
#pragma GCC unroll 9
            for (int i = 0; i < Tokens; ++i) {
                const int8_t* token = tokens + (i * lines + l) * kLineCodes;
                add_line(sums[i * Columns + c], even, token);
                add_line(sums[i * Columns + c], odd, token + kLineBytes);
            }
        }
    };
    const int64_t whole = row_bytes / kLineBytes;
    for (int64_t l = 0; l < whole; ++l) line(l, ~__mmask64{0});
    if (whole < lines) line(whole, (__mmask64{1} << row_bytes % kLineBytes) - 1);
#pragma GCC unroll 2
    for (int begin = 0; begin < kSums; begin += 16) {
        int32_t totals[16];
        _mm512_storeu_si512(totals, sum_each(sums + begin));
        for (int j = begin; j < smaller(kSums, begin + 16); ++j) products[j / Columns * kTileColumns + j % Columns] = totals[j - begin];
    }
}

// `columns` weight rows, Columns at a time and the rest one by one.
template <int Tokens, int Columns>
void multiply_rows_of_lines(const int8_t* tokens, int64_t lines, const uint8_t* first, int64_t row_bytes, int64_t columns, int32_t* products) {
    int64_t c = 0;
    for (; c + Columns <= columns; c += Columns) multiply_lines<Tokens, Columns>(tokens, lines, first + c * row_bytes, row_bytes, products + c);
    for (; c < columns; ++c) multiply_lines<Tokens, 1>(tokens, lines, first + c * row_bytes, row_bytes, products + c);
}

// sums (M, kTileColumns): the float sums of rows n .. n + columns of the weight, before x_scale. `tokens` is what arrange_tokens made.
inline void few_tokens_product(const Activations& x, const int8_t* tokens, const Weight& weight, int64_t n, int64_t columns, float* sums) {
    using Multiply = void (*)(const int8_t*, int64_t, const uint8_t*, int64_t, int64_t, int32_t*);
    static constexpr Multiply kByTokens[] = {nullptr,
                                             multiply_rows_of_lines<2, 8>,
                                             multiply_rows_of_lines<3, 6>,
                                             multiply_rows_of_lines<4, 5>,
                                             multiply_rows_of_lines<5, 4>,
                                             multiply_rows_of_lines<6, 3>,
                                             multiply_rows_of_lines<7, 3>,
                                             multiply_rows_of_lines<8, 2>,
                                             multiply_rows_of_lines<9, 2>};
    int32_t products[(kFewTokens + 1) * kTileColumns] = {};
    kByTokens[x.M](tokens, line_count(x.K), weight.row(n), packed_row_bytes(x.K, 4), columns, products);
    const int32_t* code_sums = products + x.M * kTileColumns;
    const int32_t K = static_cast<int32_t>(x.K);
    for (int64_t m = 0; m < x.M; ++m) {
        const int32_t above = 128 - x.zero_point[x.per_token ? m : 0], token_sum = x.sums[m] - 128 * K;
        for (int64_t c = 0; c < columns; ++c) {
            const int64_t block = weight.block(n + c, 0);
            const int32_t zero = weight.zero_point[block];
            const int32_t exact = products[m * kTileColumns + c] - zero * token_sum + above * (code_sums[c] - K * zero);
            sums[m * kTileColumns + c] = static_cast<float>(exact) * weight.scale[block];
        }
    }
}

}  // namespace prequant::PREQUANT_LEVEL

#endif
