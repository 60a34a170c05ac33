// The integer products of a few tokens straight from the packed words: no panel, each word is loaded once and unpacked in registers.
//
//   columns    two vectors of weight rows at a time, all tokens beside them
//   bytes      8-bit activations times codes 0 ... 15 as they are                words    blocks of int16 (block_product.h) times code - zero_point
//
// Sums in    int32, exact; avx2 adds bytes up in int16 over runs of kPackedRun steps first, which codes up to 15 allow. Blocks in float32.
// Limited by loading the words; in cache by 4 + 2 M instructions (avx2: 4 + 3 M) for the four codes of a lane.
#pragma once

#include "block_rows.h"
#include "weight_panel.h"

namespace prequant::PREQUANT_LEVEL {

constexpr int64_t kFewTokens = 8;

inline bool suits_few_tokens(int64_t M, const Weight& weight) { return M <= kFewTokens && weight.G == 1; }

#if PREQUANT_AVX512 || PREQUANT_AVX2
constexpr int kPackedRun = 4, kPackedTop = 15;
static_assert(kPackedRun * 2 * 255 * kPackedTop <= INT16_MAX, "a run must fit int16");
constexpr int kFewVectors = 2;
constexpr int kTokensAtOnce = PREQUANT_AVX512 ? 8 : 4;

// products[i * kPanelColumns + c] of Tokens rows of codes and the columns of two vectors.
template <int Container, int Tokens>
inline void multiply_packed(const PackedColumns& columns, int first, int64_t words, const uint8_t* codes, int64_t stride, int32_t* products) {
    constexpr int kSteps = word_codes(Container) / static_cast<int>(kQuad), kWords = kHasByteRuns ? kPackedRun / kSteps : 1;  // of a run
    const Ints mask = broadcast(static_cast<int32_t>(((1u << Container) - 1) * 0x01010101u));
    const auto add_word = [&](int64_t w, Ints(&run)[Tokens][kFewVectors]) PREQUANT_INLINE {
        const Ints word[kFewVectors] = {columns.word(w, first), columns.word(w, first + 1)};
        const uint8_t* const from = codes + w * word_codes(Container);
        unrolled<kSteps>([&](auto s) PREQUANT_INLINE {
            const Ints weights[kFewVectors] = {(word[0] >> (Container * s)) & mask, (word[1] >> (Container * s)) & mask};
            unrolled<Tokens>([&](auto i) PREQUANT_INLINE {
                const Ints x = broadcast_lane(from + i * stride + s * kQuad);
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
        int64_t w = 0;
        for (; w + kWords <= words; w += kWords) add_words(w, Index<kWords>{});
        for (; w < words; ++w) add_words(w, Index<1>{});
    } else {
        for (int64_t w = 0; w < words; ++w) add_word(w, sums);
    }
    unrolled<Tokens>([&](auto i) PREQUANT_INLINE {
        unrolled<kFewVectors>([&](auto v) PREQUANT_INLINE { store_vector(products + i * kPanelColumns + (first + v) * kLanes, sums[i][v]); });
    });
}

template <int Container>
inline void multiply_packed_tokens(const PackedColumns& columns, int64_t words, int64_t tokens, const uint8_t* codes, int64_t stride, int32_t* products) {
    using Multiply = void (*)(const PackedColumns&, int, int64_t, const uint8_t*, int64_t, int32_t*);
    static constexpr Multiply kByTokens[] = {
        nullptr,
        multiply_packed<Container, 1>,
        multiply_packed<Container, 2>,
        multiply_packed<Container, 3>,
        multiply_packed<Container, 4>,
#if PREQUANT_AVX512
        multiply_packed<Container, 5>,
        multiply_packed<Container, 6>,
        multiply_packed<Container, 7>,
        multiply_packed<Container, 8>,
#endif
    };
    for (int64_t passes = ceil_div(tokens, kTokensAtOnce), i = 0; passes > 0; --passes) {
        const int64_t count = ceil_div(tokens - i, passes);
        for (int first = 0; first < kColumnVectors; first += kFewVectors)
            kByTokens[count](columns, first, words, codes + i * stride, stride, products + i * kPanelColumns);
        i += count;
    }
}

// sums (M, kPanelColumns): the float sums of columns n ... of y, before x_scale.
inline void multiply_few_tokens(const Activations& x, const uint8_t* codes, int64_t stride, const Weight& weight, int64_t n, int32_t* products, float* sums) {
    const PackedColumns columns(weight, n);
    const int64_t words = panel_words(weight.K, weight.container);
    if (weight.container == 2)
        multiply_packed_tokens<2>(columns, words, x.M, codes, stride, products);
    else
        multiply_packed_tokens<4>(columns, words, x.M, codes, stride, products);
    alignas(64) int32_t zeros[kPanelColumns];
    alignas(64) float scales[kPanelColumns];
    column_zeros(weight, n, 0, zeros);
    column_scales(weight, n, 0, scales);
    for (int v = 0; v < kColumnVectors; ++v) {
        const Ints zero = load_vector<Ints>(zeros + v * kLanes), code_sums = columns.word(words, v) - broadcast(static_cast<int32_t>(weight.K)) * zero;
        for (int64_t m = 0; m < x.M; ++m) {
            const int32_t token_zero = x.zero_point[x.per_token ? m : 0], token_sum = x.sums[m];
            const Ints product = load_vector<Ints>(products + m * kPanelColumns + v * kLanes);
            const Ints exact = product - broadcast(token_zero) * code_sums - broadcast(token_sum) * zero;
            store(sums + m * kPanelColumns + v * kLanes, to_floats(exact) * load(scales + v * kLanes));
        }
    }
}

// totals[i * kPanelColumns + c]: the float sums, before the scale, of Tokens rows of words, each in blocks of kBlock with a step of its own.
template <int Container, int Tokens>
inline void multiply_packed_words(const PackedColumns& columns, int first, int64_t words, const int32_t* zeros, const BlockRows& rows, int64_t row,
                                  float* totals) {
    constexpr int kQuads = word_codes(Container) / static_cast<int>(kQuad);
    constexpr int64_t kBlockWords = kBlock / word_codes(Container);
    const Ints mask = broadcast(((1 << Container) - 1) * 0x00010001);
    const Ints zero[kFewVectors] = {load_vector<Ints>(zeros + first * kLanes) * 0x00010001, load_vector<Ints>(zeros + (first + 1) * kLanes) * 0x00010001};
    const char* const values = reinterpret_cast<const char*>(rows.values + row * rows.stride);
    Vector results[Tokens][kFewVectors];
    unrolled<Tokens>([&](auto i) PREQUANT_INLINE { results[i][0] = results[i][1] = Vector{}; });
    for (int64_t block = 0; block < rows.blocks; ++block) {
        Ints sums[Tokens][kFewVectors];
        unrolled<Tokens>([&](auto i) PREQUANT_INLINE { sums[i][0] = sums[i][1] = Ints{}; });
        for (int64_t w = block * kBlockWords; w < smaller(words, (block + 1) * kBlockWords); ++w) {
            const Ints word[kFewVectors] = {columns.word(w, first), columns.word(w, first + 1)};
            const char* const from = values + w * word_codes(Container) * 2;
            unrolled<2 * kQuads>([&](auto step) PREQUANT_INLINE {
                constexpr int kShift = step.value / 2 * Container + step.value % 2 * 8;
                const Ints weights[kFewVectors] = {subtract_words((word[0] >> kShift) & mask, zero[0]), subtract_words((word[1] >> kShift) & mask, zero[1])};
                unrolled<Tokens>([&](auto i) PREQUANT_INLINE {
                    const Ints x = broadcast_lane(from + i * rows.stride * 2 + step * 4);
                    dot_words_in_registers(sums[i][0], x, weights[0]);
                    dot_words_in_registers(sums[i][1], x, weights[1]);
                });
            });
        }
        unrolled<Tokens>([&](auto i) PREQUANT_INLINE {
            const Vector step = broadcast(rows.steps[(row + i) * rows.blocks + block]);
            results[i][0] = multiply_add(to_floats(sums[i][0]), step, results[i][0]);
            results[i][1] = multiply_add(to_floats(sums[i][1]), step, results[i][1]);
        });
    }
    unrolled<Tokens>([&](auto i) PREQUANT_INLINE {
        unrolled<kFewVectors>([&](auto v) PREQUANT_INLINE { store(totals + (row + i) * kPanelColumns + (first + v) * kLanes, results[i][v]); });
    });
}

template <int Container>
inline void multiply_packed_blocks(const PackedColumns& columns, int64_t words, const int32_t* zeros, int64_t tokens, const BlockRows& rows, float* totals) {
    using Multiply = void (*)(const PackedColumns&, int, int64_t, const int32_t*, const BlockRows&, int64_t, float*);
    static constexpr Multiply kByTokens[] = {
        nullptr,
        multiply_packed_words<Container, 1>,
        multiply_packed_words<Container, 2>,
        multiply_packed_words<Container, 3>,
        multiply_packed_words<Container, 4>,
    };
    for (int64_t passes = ceil_div(tokens, 4), i = 0; passes > 0; --passes) {
        const int64_t count = ceil_div(tokens - i, passes);
        for (int first = 0; first < kColumnVectors; first += kFewVectors) kByTokens[count](columns, first, words, zeros, rows, i, totals);
        i += count;
    }
}

// totals (M, kPanelColumns) of columns n ... of the weight, before its scale.
inline void multiply_few_blocks(const BlockRows& rows, int64_t tokens, const Weight& weight, int64_t n, float* totals) {
    const PackedColumns columns(weight, n);
    const int64_t words = panel_words(weight.K, weight.container);
    alignas(64) int32_t zeros[kPanelColumns];
    column_zeros(weight, n, 0, zeros);
    switch (weight.container) {
        case 2: return multiply_packed_blocks<2>(columns, words, zeros, tokens, rows, totals);
        case 4: return multiply_packed_blocks<4>(columns, words, zeros, tokens, rows, totals);
        default: return multiply_packed_blocks<8>(columns, words, zeros, tokens, rows, totals);
    }
}
#endif

}  // namespace prequant::PREQUANT_LEVEL
