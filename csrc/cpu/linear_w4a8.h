// y = x̂ W^T + outliers + bias on 8-bit activations:
//     (sum over g of float(S(a - za)(w - zw)) scale[n, g]) x_scale[m], then float terms.
//                                                                                        Meaning: reference.linear_w4a8
//   task      up to kIntegerRows rows of x times kPanelColumns columns of y, a piece of K after the other: the weight's
//             panel of the piece is built once, small enough for the L1 cache, and multiplied with every row
//   bytes     the codes as they are, times w - center:
//                 S(a - za)(w - zw) = S a (w - center) - za S(w - zw) - (zw - center) S a
//             (2 and 4 bits where the level has byte products; the sums of w are the prepacked weight's, or made with
//             the panel where it has groups)
//   words     a - za and w - zw as int16 (the rest)
//   few       up to kFewTokens rows: no panel, the packed words are unpacked in registers (few_tokens.h)
//
// Requires   x.sums: of the codes of each of the weight's groups.
// Sums in    int32 within a group (words: int64 beyond kWordsDepth): exact. Groups in float32 in index order: the same
//            bits on every level.
// Limited by the integer multiply-adds from M of about 16; below by unpacking, or by loading the weight.
#pragma once

#include "few_tokens.h"
#include "outlier_side.h"

namespace prequant::PREQUANT_LEVEL {

constexpr int64_t kIntegerRows = 256;
constexpr int64_t kPieceSteps = 128;  // 16 KiB of panel
constexpr int64_t kWordsDepth = 32768;
static_assert(kWordsDepth * 255 * 255 <= INT32_MAX, "the products of 8-bit codes must fit int32 up to here");
constexpr int64_t kBytesDepth = int64_t{1} << 19;
static_assert(kBytesDepth * 255 * 15 <= INT32_MAX, "the products of 4-bit codes must fit int32 up to here");

// One task's memory.
struct IntegerTask {
    static constexpr int64_t kSums = kIntegerRows * kPanelColumns;
    static constexpr int64_t kPanel = (kPieceSteps + 2) * kStepBytes;  // 2: quads cut by a group's edge
    static constexpr int64_t kBytes = kPanel + OutlierSide::kScratchBytes + kSums * 16;
    explicit IntegerTask(void* memory)
        : panel(static_cast<char*>(memory)),
          scratch(reinterpret_cast<float*>(panel + kPanel)),
          sums(scratch + OutlierSide::kScratchBytes / 4),
          products(reinterpret_cast<int32_t*>(sums + kSums)),
          long_sums(reinterpret_cast<int64_t*>(products + kSums)) {}
    char* panel;
    float *scratch, *sums;
    int32_t* products;
    int64_t* long_sums;
};

// Adds panel times rows to products, or (is_first) writes them.
template <typename Product>
inline void multiply_into(bool is_first, int64_t rows, int64_t steps, const char* a, int64_t stride, const char* panel,
                          int32_t* products) {
    const auto assign = [&](int64_t i, int64_t c, Ints sum) { store_vector(products + i * kPanelColumns + c, sum); };
    const auto add = [&](int64_t i, int64_t c, Ints sum) {
        int32_t* const product = products + i * kPanelColumns + c;
        store_vector(product, load_vector<Ints>(product) + sum);
    };
    if (is_first)
        multiply_integer_panel<Product>(rows, steps, a, stride, panel, assign);
    else
        multiply_integer_panel<Product>(rows, steps, a, stride, panel, add);
}

#if PREQUANT_AVX512 || PREQUANT_AVX2
inline void byte_panel_of(const Weight& weight, const PackedColumns& columns, int64_t k_begin, int64_t k_end,
                          int center, char* panel) {
    if (weight.container == 2)
        byte_panel<2>(columns, k_begin, k_end, center, panel);
    else
        byte_panel<4>(columns, k_begin, k_end, center, panel);
}

// sums (rows, kPanelColumns) of rows m ... of x, whose codes are `stride` apart, before x_scale. Groups: whether the
// weight has more than one; Paired: whether their terms are (few_tokens.h).
template <bool Groups, bool Paired>
inline void multiply_bytes(const Activations& x, const uint8_t* codes, int64_t stride, int64_t m, int64_t rows,
                           const Weight& weight, int64_t n, const IntegerTask& task) {
    constexpr int64_t kPiece = kPieceSteps * ByteProduct::kCodes;
    const int64_t G = weight.G, size = weight.K / G;
    const int center = kHasByteRuns ? weight.container == 4 ? kByteLimit : 0 : 0;
    const PackedColumns columns(weight, n);
    const char* const a = reinterpret_cast<const char*>(codes + m * stride);
    alignas(64) int32_t zeros[kPanelColumns], code_sums[kPanelColumns];
    alignas(64) float scales[kPanelColumns];
    int32_t token_zeros[kIntegerRows], token_sums[kIntegerRows];  // Paired: both in token_zeros
    uint8_t ones[kPiece];
    if (Groups) std::memset(ones, 1, sizeof ones);
    if (Groups) std::memset(task.sums, 0, static_cast<size_t>(rows * kPanelColumns) * sizeof(float));
    for (int64_t g = 0; g < G; ++g) {
        const int64_t begin = g * size, end = begin + size;
        column_zeros(weight, n, begin, zeros);
        column_scales(weight, n, begin, scales);
        for (int64_t i = 0; i < rows; ++i) {
            token_zeros[i] = x.zero_point[x.per_token ? m + i : 0], token_sums[i] = x.sums[(m + i) * G + g];
            if (Paired) token_zeros[i] = token_pair(token_zeros[i], token_sums[i]);
        }
        Ints of_zero[kColumnVectors], of_sum[kColumnVectors];
        const auto finish = [&](int64_t i, int64_t c, Ints product) PREQUANT_INLINE {
            if constexpr (Paired)
                dot_words(product, broadcast(token_zeros[i]), of_zero[c / kLanes]);
            else
                product = product - broadcast(token_zeros[i]) * of_zero[c / kLanes] -
                          broadcast(token_sums[i]) * of_sum[c / kLanes];
            float* const sum = task.sums + i * kPanelColumns + c;
            const Vector scaled = to_floats(product) * load(scales + c);
            store(sum, Groups ? load(sum) + scaled : scaled);
        };
        const bool is_one_piece = size <= kPiece;
        if (Groups) {
            std::memset(code_sums, 0, sizeof code_sums);
        } else {
            for (int v = 0; v < kColumnVectors; ++v)
                store_vector(code_sums + v * kLanes, columns.word(panel_words(weight.K, weight.container), v));
        }
        for (int64_t k = begin; k < end; k += kPiece) {
            const int64_t k_end = smaller(end, k + kPiece), steps = ceil_div(k_end - k, ByteProduct::kCodes);
            byte_panel_of(weight, columns, k, k_end, center, task.panel);
            if constexpr (Groups)  // a row of ones adds the codes up; center comes back below
                multiply_integer_panel<ByteProduct>(
                    1, steps, reinterpret_cast<const char*>(ones), 0, task.panel, [&](int64_t, int64_t c, Ints sum) {
                        store_vector(code_sums + c, load_vector<Ints>(code_sums + c) + sum +
                                                        broadcast(static_cast<int32_t>(k_end - k) * center));
                    });
            for (int v = 0; v < kColumnVectors && k_end == end; ++v) {
                const Ints zero = load_vector<Ints>(zeros + v * kLanes),
                           sum = load_vector<Ints>(code_sums + v * kLanes);
                of_sum[v] = zero - broadcast(center);
                of_zero[v] = sum - broadcast(static_cast<int32_t>(size)) * zero;
                if (Paired) of_zero[v] = column_pairs(of_zero[v], of_sum[v]);
            }
            if (is_one_piece)
                multiply_integer_panel<ByteProduct>(rows, steps, a + k, stride, task.panel, finish);
            else
                multiply_into<ByteProduct>(k == begin, rows, steps, a + k, stride, task.panel, task.products);
        }
        if (!is_one_piece)
            for (int64_t i = 0; i < rows; ++i)
                for (int64_t c = 0; c < kPanelColumns; c += kLanes)
                    finish(i, c, load_vector<Ints>(task.products + i * kPanelColumns + c));
    }
}
#endif

// The same for activations that are words already: a - za, (M, stride) int16 in the order of word panels.
inline void multiply_words(const int16_t* tokens, int64_t stride, int64_t m, int64_t rows, const Weight& weight,
                           int64_t n, const IntegerTask& task) {
    constexpr int64_t kPiece = kPieceSteps * WordProduct::kCodes;
    const int64_t G = weight.G, size = weight.K / G;
    const bool is_long = size > kWordsDepth;
    alignas(64) float scales[kPanelColumns];
    std::memset(task.sums, 0, static_cast<size_t>(rows * kPanelColumns) * sizeof(float));
    for (int64_t g = 0; g < G; ++g) {
        const int64_t begin = g * size, end = begin + size;
        column_scales(weight, n, begin, scales);
        if (is_long) std::memset(task.long_sums, 0, static_cast<size_t>(rows * kPanelColumns) * sizeof(int64_t));
        for (int64_t k = begin, flushed = begin; k < end;) {
            const int64_t k_end = smaller(end, (k / kPiece + 1) * kPiece), quad = k / kQuad * kQuad;
            word_panel(weight, n, k, k_end, task.panel);
            multiply_into<WordProduct>(k == flushed, rows, ceil_div(k_end - quad, kQuad) * 2,
                                       reinterpret_cast<const char*>(tokens + m * stride + quad), stride * 2,
                                       task.panel, task.products);
            k = k_end;
            if (is_long && (k == end || k + kPiece - flushed > kWordsDepth)) {
                for (int64_t i = 0; i < rows * kPanelColumns; ++i) task.long_sums[i] += task.products[i];
                flushed = k;
            }
        }
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t c = 0; c < kPanelColumns; ++c) {
                const int64_t j = i * kPanelColumns + c;
                task.sums[j] +=
                    (is_long ? static_cast<float>(task.long_sums[j]) : static_cast<float>(task.products[j])) *
                    scales[c];
            }
    }
}

// a - za of `rows` rows of codes as int16, quads in the order of word panels, 0 beyond K.
inline void words_of_tokens(const Activations& x, int64_t m, int64_t rows, int64_t stride, int16_t* words) {
    parallel_for(rows, x.K / 4, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const uint8_t* const codes = x.codes + (m + i) * x.K;
            const int zero = x.zero_point[x.per_token ? m + i : 0];
            int16_t* const out = words + i * stride;
            std::memset(out, 0, static_cast<size_t>(stride) * sizeof(int16_t));
            for (int64_t k = 0; k < x.K; ++k)
                out[k / kQuad * kQuad + k % 2 * 2 + k % kQuad / 2] = static_cast<int16_t>(codes[k] - zero);
        }
    });
}

inline void linear_w4a8(Activations x, const Matrix* raw, Weight weight, Outliers outliers, const float* bias,
                        MutableMatrix y, Stream) {
    const int64_t M = x.M, N = weight.N, K = weight.K, r = outliers.r;
    if (M == 0 || N == 0) return;
    const ActivationRows source{raw ? *raw : Matrix{nullptr, Dtype::float32, 0, 0}, x};
    const OutlierSide outlier_side(outliers, true, K, N);
    const bool has_bytes =
        kHasBytes && weight.container != 8 && K / weight.G <= kBytesDepth && are_whole_words(weight, 0, K / weight.G);

    // Rows of x are taken as many at a time as keep what is needed besides the product small: the outliers' side, and
    // the activations where they are copied.
    const bool is_copied = !has_bytes || K % word_codes(weight.container) != 0;  // whole words are read
    const int64_t stride = ceil_div(K, 16) * 16, copied_bytes = is_copied ? stride * (has_bytes ? 1 : 2) : 0;
    const int64_t rows_at_once =
        smaller(M, larger<int64_t>(1, (int64_t{1} << 20) / larger<int64_t>(1, copied_bytes + 4 * r)));
    // has_bytes says that groups are whole words.
    [[maybe_unused]] const bool is_few = has_bytes && rows_at_once == M && suits_few_tokens(M, weight, 1);
#if PREQUANT_AVX512 || PREQUANT_AVX2
    const auto multiply = weight.G == 1             ? multiply_bytes<false, false>
                          : fit_pairs(K / weight.G) ? multiply_bytes<true, true>
                                                    : multiply_bytes<true, false>;
#endif
    const Buffer side_buffer(outlier_side.side_bytes(rows_at_once)), copy_buffer(rows_at_once * copied_bytes);
    float* const side = static_cast<float*>(side_buffer.data());
    const int64_t panels = ceil_div(N, kPanelColumns);
    for (int64_t m0 = 0; m0 < M; m0 += rows_at_once) {
        const int64_t here = smaller(rows_at_once, M - m0);
        outlier_side.prepare(source, m0, here, side);
        uint8_t* const bytes = static_cast<uint8_t*>(copy_buffer.data());
        int16_t* const words = static_cast<int16_t*>(copy_buffer.data());
        if (!has_bytes) words_of_tokens(x, m0, here, stride, words);
        for (int64_t i = 0; is_copied && has_bytes && i < here; ++i) {
            std::memcpy(bytes + i * stride, x.codes + (m0 + i) * K, static_cast<size_t>(K));
            std::memset(bytes + i * stride + K, 0, static_cast<size_t>(stride - K));
        }
        const int64_t row_blocks = ceil_div(here, kIntegerRows), rows_a_task = ceil_div(here, row_blocks);
        parallel_for(row_blocks * panels, (rows_a_task + 3) * K * kPanelColumns / (kHasBytes ? 96 : 24),
                     [&](int64_t begin, int64_t end) {
                         const IntegerTask task(thread_scratch(IntegerTask::kBytes));
                         for (int64_t index = begin; index < end; ++index) {
                             const int64_t block = index / panels * rows_a_task, m = m0 + block,
                                           n = index % panels * kPanelColumns;
                             const int64_t rows = smaller(rows_a_task, here - block),
                                           columns = smaller<int64_t>(kPanelColumns, N - n);
                             if (!has_bytes) multiply_words(words, stride, block, rows, weight, n, task);
#if PREQUANT_AVX512 || PREQUANT_AVX2
                             // Either the tensor's own codes or the copy, which begins at row m0.
                             const uint8_t* const codes = is_copied ? bytes - m0 * stride : x.codes;
                             if (is_few)
                                 multiply_few_tokens(x, codes, is_copied ? stride : K, weight, n, task.products,
                                                     task.sums);
                             else if (has_bytes)
                                 multiply(x, codes, is_copied ? stride : K, m, rows, weight, n, task);
#endif
                             for (int64_t i = 0; i < rows; ++i) {
                                 const Vector scale = broadcast(x.scale[x.per_token ? m + i : 0]);
                                 float* const row = task.sums + i * kPanelColumns;
                                 for (int64_t c = 0; c < kPanelColumns; c += kLanes)
                                     store(row + c, load(row + c) * scale);
                             }
                             outlier_side.add(rows, n, side + block * r, task.scratch, task.sums);
                             for (int64_t i = 0; i < rows; ++i) {
                                 float* const row = task.sums + i * kPanelColumns;
                                 for (int64_t c = 0; bias && c < columns; ++c) row[c] += bias[n + c];
                                 store_floats(row, columns, y.data, y.dtype, (m + i) * N + n);
                             }
                         }
                     });
    }
}

}  // namespace prequant::PREQUANT_LEVEL
