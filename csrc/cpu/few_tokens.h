// The integer products of a few tokens straight from the packed words: no panel, each word is loaded once and unpacked
// in registers.
//
//   columns    two vectors of weight rows at a time, each with all tokens
//   bytes      8-bit activations times codes 0 ... 15 as they are
//   words      blocks of int16 (block_product.h) times code - zero_point
//   groups     one after the other; bytes: a token of ones makes the sums of a group's codes, which the weight has of
//              whole rows alone
//
// Sums in    int32, exact; avx2 adds bytes up in int16 over runs of kPackedRun steps first, which codes up to 15 allow.
//            Blocks in float32.
// Limited by loading the words; in cache by 4 + 2 M instructions (avx2: 4 + 3 M) for the four codes of a lane.
#pragma once

#include "block_rows.h"
#include "weight_panel.h"

namespace prequant::PREQUANT_LEVEL {

constexpr int64_t kFewTokens = 8;

// unit: the codes that a group must be made of.
inline bool suits_few_tokens(int64_t M, const Weight& weight, int64_t unit) {
    return M <= kFewTokens && (weight.G == 1 || weight.K / weight.G % unit == 0);
}

#if PREQUANT_AVX512 || PREQUANT_AVX2
constexpr int kPackedRun = 4, kPackedTop = 15;
static_assert(kPackedRun * 2 * 255 * kPackedTop <= INT16_MAX, "a run must fit int16");
constexpr int kFewVectors = 2;
constexpr int kTokensAtOnce = PREQUANT_AVX512 ? 8 : 4;

// What a token's zero point za and sum of codes S a make of its product with a column, S a w:
//     S(a - za)(w - zw) = S a w - za S(w - zw) - zw S a.
// Where all terms fit int16, the column's (-S(w - zw), -zw) are one lane, and one multiply-add of words with (za, S a)
// is both.
constexpr bool fit_pairs(int64_t group_size) { return group_size <= INT16_MAX / 255; }
inline int32_t token_pair(int32_t zero_point, int32_t code_sum) { return code_sum << 16 | zero_point; }
inline Ints column_pairs(Ints of_zero, Ints of_sum) {
    return ((Ints{} - of_zero) & broadcast(0xffff)) | ((Ints{} - of_sum) << 16);
}

// products[i * kPanelColumns + c] of Tokens rows of codes, which begin at k = 0, the columns of two vectors, and words
// begin .. end; with Ones the last row is all ones.
template <int Container, int Tokens, bool Ones>
inline void multiply_packed(const PackedColumns& columns, int first, int64_t begin, int64_t end, const uint8_t* codes,
                            int64_t stride, int32_t* products) {
    // kSteps: of a word; kWords: of a run.
    constexpr int kSteps = word_codes(Container) / static_cast<int>(kQuad),
                  kWords = kHasByteRuns ? kPackedRun / kSteps : 1;
    const Ints mask = broadcast(static_cast<int32_t>(((1u << Container) - 1) * 0x01010101u));
    const auto add_word = [&](int64_t w, Ints(&run)[Tokens][kFewVectors]) PREQUANT_INLINE {
        const Ints word[kFewVectors] = {columns.word(w, first), columns.word(w, first + 1)};
        const uint8_t* const from = codes + w * word_codes(Container);
        unrolled<kSteps>([&](auto s) PREQUANT_INLINE {
            const Ints weights[kFewVectors] = {(word[0] >> (Container * s)) & mask,
                                               (word[1] >> (Container * s)) & mask};
            unrolled<Tokens>([&](auto i) PREQUANT_INLINE {
                const Ints x =
                    Ones && i == Tokens - 1 ? broadcast(0x01010101) : broadcast_lane(from + i * stride + s * kQuad);
                dot_bytes_in_registers(run[i][0], x, weights[0]);
                dot_bytes_in_registers(run[i][1], x, weights[1]);
            });
        });
    };
    Ints sums[Tokens][kFewVectors];
    unrolled<Tokens>([&](auto i) PREQUANT_INLINE { sums[i][0] = sums[i][1] = Ints{}; });
    if constexpr (kHasByteRuns) {
        const auto add_words = [&](int64_t w, auto count) PREQUANT_INLINE {
            Ints run[Tokens][kFewVectors];
            unrolled<Tokens>([&](auto i) PREQUANT_INLINE { run[i][0] = run[i][1] = Ints{}; });
            unrolled<count.value>([&](auto next) PREQUANT_INLINE { add_word(w + next, run); });
            unrolled<Tokens>([&](auto i) PREQUANT_INLINE {
                add_run(sums[i][0], run[i][0]);
                add_run(sums[i][1], run[i][1]);
            });
        };
        int64_t w = begin;
        for (; w + kWords <= end; w += kWords) add_words(w, Index<kWords>{});
        for (; w < end; ++w) add_words(w, Index<1>{});
    } else {
        for (int64_t w = begin; w < end; ++w) add_word(w, sums);
    }
    unrolled<Tokens>([&](auto i) PREQUANT_INLINE {
        unrolled<kFewVectors>([&](auto v) PREQUANT_INLINE {
            store_vector(products + i * kPanelColumns + (first + v) * kLanes, sums[i][v]);
        });
    });
}

// The products of all tokens; with Ones those of a row of ones behind them.
template <int Container, bool Ones>
inline void multiply_packed_tokens(const PackedColumns& columns, int64_t begin, int64_t end, int64_t tokens,
                                   const uint8_t* codes, int64_t stride, int32_t* products) {
    using Multiply = void (*)(const PackedColumns&, int, int64_t, int64_t, const uint8_t*, int64_t, int32_t*);
    static constexpr Multiply kByTokens[][2] = {
        {nullptr, nullptr},
        {multiply_packed<Container, 1, false>, multiply_packed<Container, 1, true>},
        {multiply_packed<Container, 2, false>, multiply_packed<Container, 2, true>},
        {multiply_packed<Container, 3, false>, multiply_packed<Container, 3, true>},
        {multiply_packed<Container, 4, false>, multiply_packed<Container, 4, true>},
#if PREQUANT_AVX512
        {multiply_packed<Container, 5, false>, multiply_packed<Container, 5, true>},
        {multiply_packed<Container, 6, false>, multiply_packed<Container, 6, true>},
        {multiply_packed<Container, 7, false>, multiply_packed<Container, 7, true>},
        {multiply_packed<Container, 8, false>, multiply_packed<Container, 8, true>},
#endif
    };
    const int64_t rows = tokens + Ones;
    for (int64_t passes = ceil_div(rows, kTokensAtOnce), i = 0; passes > 0; --passes) {
        const int64_t count = ceil_div(rows - i, passes);
        for (int first = 0; first < kColumnVectors; first += kFewVectors)
            kByTokens[count][Ones && i + count == rows](columns, first, begin, end, codes + i * stride, stride,
                                                        products + i * kPanelColumns);
        i += count;
    }
}

// sums (M, kPanelColumns): the float sums of columns n ... of y, before x_scale. products: scratch of M + 1 rows.
inline void multiply_few_tokens(const Activations& x, const uint8_t* codes, int64_t stride, const Weight& weight,
                                int64_t n, int32_t* products, float* sums) {
    const PackedColumns columns(weight, n);
    const int64_t G = weight.G, size = weight.K / G, words = panel_words(weight.K, weight.container),
                  group_words = G == 1 ? words : words / G;
    const bool is_grouped = G > 1, is_paired = fit_pairs(size);
    const auto multiply = weight.container == 2
                              ? (is_grouped ? multiply_packed_tokens<2, true> : multiply_packed_tokens<2, false>)
                              : (is_grouped ? multiply_packed_tokens<4, true> : multiply_packed_tokens<4, false>);
    for (int64_t g = 0; g < G; ++g) {
        multiply(columns, g * group_words, (g + 1) * group_words, x.M, codes, stride, products);
        alignas(64) int32_t zeros[kPanelColumns];
        alignas(64) float scales[kPanelColumns];
        column_zeros(weight, n, g * size, zeros);
        column_scales(weight, n, g * size, scales);
        for (int v = 0; v < kColumnVectors; ++v) {
            const Ints all =
                is_grouped ? load_vector<Ints>(products + x.M * kPanelColumns + v * kLanes) : columns.word(words, v);
            const Ints zero = load_vector<Ints>(zeros + v * kLanes),
                       code_sums = all - broadcast(static_cast<int32_t>(size)) * zero;
            const Ints pairs = column_pairs(code_sums, zero);
            for (int64_t m = 0; m < x.M; ++m) {
                const int32_t token_zero = x.zero_point[x.per_token ? m : 0], token_sum = x.sums[m * G + g];
                Ints exact = load_vector<Ints>(products + m * kPanelColumns + v * kLanes);
                if (is_paired)
                    dot_words_in_registers(exact, broadcast(token_pair(token_zero, token_sum)), pairs);
                else
                    exact = exact - broadcast(token_zero) * code_sums - broadcast(token_sum) * zero;
                float* const sum = sums + m * kPanelColumns + v * kLanes;
                const Vector scaled = to_floats(exact) * load(scales + v * kLanes);
                store(sum, g == 0 ? scaled : load(sum) + scaled);
            }
        }
    }
}

// Zero point and scale of each column, for blocks begin .. end of kBlock codes; the row's last block may be ragged.
struct ColumnGroup {
    int64_t begin, end;
    alignas(64) int32_t zeros[kPanelColumns];
    alignas(64) float scales[kPanelColumns];
};

// totals[i * kPanelColumns + c] += the float sums of Tokens rows of words and a group's codes, each block with a step
// of its own; the first group writes.
template <int Container, int Tokens>
inline void multiply_packed_words(const PackedColumns& columns, int first, int64_t words, const ColumnGroup& group,
                                  const BlockRows& rows, int64_t row, float* totals) {
    constexpr int kQuads = word_codes(Container) / static_cast<int>(kQuad);
    constexpr int64_t kBlockWords = kBlock / word_codes(Container);
    const Ints mask = broadcast(((1 << Container) - 1) * 0x00010001);
    Ints zero[kFewVectors];
    Vector scale[kFewVectors];
    unrolled<kFewVectors>([&](auto v) PREQUANT_INLINE {
        zero[v] = load_vector<Ints>(group.zeros + (first + v) * kLanes) * 0x00010001;
        scale[v] = load(group.scales + (first + v) * kLanes);
    });
    const char* const values = reinterpret_cast<const char*>(rows.values + row * rows.stride);
    const auto total = [&](int64_t i, int64_t v)
                           PREQUANT_INLINE { return totals + (row + i) * kPanelColumns + (first + v) * kLanes; };
    Vector results[Tokens][kFewVectors];
    unrolled<Tokens>([&](auto i) PREQUANT_INLINE {
        unrolled<kFewVectors>([&](auto v)
                                  PREQUANT_INLINE { results[i][v] = group.begin == 0 ? Vector{} : load(total(i, v)); });
    });
    for (int64_t block = group.begin; block < group.end; ++block) {
        Ints sums[Tokens][kFewVectors];
        unrolled<Tokens>([&](auto i) PREQUANT_INLINE { sums[i][0] = sums[i][1] = Ints{}; });
        for (int64_t w = block * kBlockWords; w < smaller(words, (block + 1) * kBlockWords); ++w) {
            const Ints word[kFewVectors] = {columns.word(w, first), columns.word(w, first + 1)};
            const char* const from = values + w * word_codes(Container) * 2;
            unrolled<2 * kQuads>([&](auto step) PREQUANT_INLINE {
                constexpr int kShift = step.value / 2 * Container + step.value % 2 * 8;
                const Ints weights[kFewVectors] = {subtract_words((word[0] >> kShift) & mask, zero[0]),
                                                   subtract_words((word[1] >> kShift) & mask, zero[1])};
                unrolled<Tokens>([&](auto i) PREQUANT_INLINE {
                    const Ints x = broadcast_lane(from + i * rows.stride * 2 + step * 4);
                    dot_words_in_registers(sums[i][0], x, weights[0]);
                    dot_words_in_registers(sums[i][1], x, weights[1]);
                });
            });
        }
        unrolled<Tokens>([&](auto i) PREQUANT_INLINE {
            const Vector step = broadcast(rows.steps[(row + i) * rows.blocks + block]);
            unrolled<kFewVectors>([&](auto v) PREQUANT_INLINE {
                results[i][v] = multiply_add(to_floats(sums[i][v]), scale[v] * step, results[i][v]);
            });
        });
    }
    unrolled<Tokens>([&](auto i) PREQUANT_INLINE {
        unrolled<kFewVectors>([&](auto v) PREQUANT_INLINE { store(total(i, v), results[i][v]); });
    });
}

template <int Container>
inline void multiply_packed_blocks(const PackedColumns& columns, int64_t words, const ColumnGroup& group,
                                   int64_t tokens, const BlockRows& rows, float* totals) {
    using Multiply =
        void (*)(const PackedColumns&, int, int64_t, const ColumnGroup&, const BlockRows&, int64_t, float*);
    static constexpr Multiply kByTokens[] = {
        nullptr,
        multiply_packed_words<Container, 1>,
        multiply_packed_words<Container, 2>,
        multiply_packed_words<Container, 3>,
        multiply_packed_words<Container, 4>,
    };
    for (int64_t passes = ceil_div(tokens, 4), i = 0; passes > 0; --passes) {
        const int64_t count = ceil_div(tokens - i, passes);
        for (int first = 0; first < kColumnVectors; first += kFewVectors)
            kByTokens[count](columns, first, words, group, rows, i, totals);
        i += count;
    }
}

// totals (M, kPanelColumns) of columns n ... of the weight; before its scale where it has no groups.
inline void multiply_few_blocks(const BlockRows& rows, int64_t tokens, const Weight& weight, int64_t n, float* totals) {
    const PackedColumns columns(weight, n);
    const int64_t words = panel_words(weight.K, weight.container), G = weight.G, size = weight.K / G;
    ColumnGroup group;
    for (int64_t g = 0; g < G; ++g) {
        group.begin = g * size / kBlock, group.end = G == 1 ? rows.blocks : group.begin + size / kBlock;
        column_zeros(weight, n, g * size, group.zeros);
        if (G > 1)
            column_scales(weight, n, g * size, group.scales);
        else
            for (float& scale : group.scales) scale = 1;
        switch (weight.container) {
            case 2: multiply_packed_blocks<2>(columns, words, group, tokens, rows, totals); break;
            case 4: multiply_packed_blocks<4>(columns, words, group, tokens, rows, totals); break;
            default: multiply_packed_blocks<8>(columns, words, group, tokens, rows, totals);
        }
    }
}
#endif

}  // namespace prequant::PREQUANT_LEVEL
