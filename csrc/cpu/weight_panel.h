// Blocks of the prepacked weight, unpacked for the products: kPanelColumns columns of the product side by side, a step
// of depth after the other.
//
//   forward   the columns are rows n ... of the weight, the depth is k
//                 bytes    step: 4 codes k of each column        - center
//                 words    step: 2 codes k as int16              - zero point
//                 floats   step: a code k                        - zero point, * scale
//   backward  the columns are k ..., the depth is n
//                 words    step: rows n, n + 1                   - zero point
//                 floats   step: a row n                         - zero point, * scale
//
// Words come in the order in which shifts bring them: of each quad of codes k ... k + 3 first k and k + 2, then k + 1
// and k + 3. Whatever meets a forward panel of words is arranged alike; backward pairs are n, n + 1.
//
// Columns, rows and codes beyond the weight are finite, and worth 0 where they are columns or where their partner in
// the product is 0.
#pragma once

#include "codes.h"
#include "integer_tile.h"

namespace prequant::PREQUANT_LEVEL {

constexpr int64_t kQuad = 4;                       // codes
constexpr int64_t kStepBytes = kPanelColumns * 4;  // of a panel of integers
constexpr int64_t kPanelDepth = 512;  // of a panel of floats or words; bytes are half as wide, and twice as deep
constexpr int64_t kWordPanelBytes = kPanelDepth / 2 * kStepBytes;

typedef int16_t Words __attribute__((vector_size(4 * kLanes)));
typedef int8_t Bytes __attribute__((vector_size(4 * kLanes)));

inline Ints subtract_words(Ints a, Ints b) {
    return reinterpret_cast<Ints>(reinterpret_cast<Words>(a) - reinterpret_cast<Words>(b));
}
inline Ints low_words(Ints v) { return (v << 16) >> 16; }
inline Ints high_words(Ints v) { return v >> 16; }

// The packed words of weight rows n ... n + kPanelColumns.
class PackedColumns {
   public:
    PackedColumns(const Weight& weight, int64_t n) {
        alignas(64) static constexpr uint8_t kMissing[kPanelBytes] = {};
        const int64_t panel = (panel_words(weight.K, weight.container) + 1) * kPanelBytes;
        for (int half = 0; half < 2; ++half) {
            const int64_t first = n + half * kPanelRows;
            const bool is_there = first < weight.N;
            panels_[half] = is_there ? weight.packed + first / kPanelRows * panel : kMissing;
            strides_[half] = is_there ? kPanelBytes : 0;
        }
    }
    // Word w of the columns kLanes * v ...
    Ints word(int64_t w, int v) const {
        constexpr int kHalf = kColumnVectors / 2;
        return load_vector<Ints>(panels_[v / kHalf] + w * strides_[v / kHalf] +
                                 v % kHalf * static_cast<int64_t>(sizeof(Ints)));
    }

   private:
    static_assert(kPanelColumns == 2 * kPanelRows);
    const uint8_t* panels_[2];
    int64_t strides_[2];
};

// zeros[c], scales[c]: of weight (n + c, k); 0 for missing columns. A null scale counts as 1.
inline void column_zeros(const Weight& weight, int64_t n, int64_t k, int32_t* zeros) {
    const int64_t apart = weight.scale_rows == 1 ? 0 : weight.G, count = smaller<int64_t>(kPanelColumns, weight.N - n);
    const uint8_t* const from = weight.zero_point + weight.block(n, k);
    for (int64_t c = 0; c < count; ++c) zeros[c] = from[c * apart];
    for (int64_t c = count; c < kPanelColumns; ++c) zeros[c] = 0;
}

inline void column_scales(const Weight& weight, int64_t n, int64_t k, float* scales) {
    const int64_t apart = weight.scale_rows == 1 ? 0 : weight.G, count = smaller<int64_t>(kPanelColumns, weight.N - n);
    const float* const from = weight.scale == nullptr ? nullptr : weight.scale + weight.block(n, k);
    for (int64_t c = 0; c < count; ++c) scales[c] = from == nullptr ? 1.0f : from[c * apart];
    for (int64_t c = count; c < kPanelColumns; ++c) scales[c] = 0;
}

inline int prepacked_code(const Weight& weight, int64_t n, int64_t k) {
    const int per_word = word_codes(weight.container);
    uint32_t word;
    std::memcpy(&word, weight.packed + panel_offset(n, k / per_word, panel_words(weight.K, weight.container)),
                sizeof word);
    return static_cast<int>(word >> word_shift(static_cast<int>(k % per_word), weight.container) &
                            ((1u << weight.container) - 1));
}

// Whether k_begin .. k_end are whole words; the row's last word may be ragged.
inline bool are_whole_words(const Weight& weight, int64_t k_begin, int64_t k_end) {
    const int per_word = word_codes(weight.container);
    return k_begin % per_word == 0 && (k_end % per_word == 0 || k_end == weight.K);
}

// ---- forward ----

// Whole words k_begin .. k_end of the columns as bytes: code - center.
template <int Container>
inline void byte_panel(const PackedColumns& columns, int64_t k_begin, int64_t k_end, int center, char* panel) {
    constexpr int kSteps = word_codes(Container) / kQuad;
    const Ints mask = broadcast(static_cast<int32_t>(((1u << Container) - 1) * 0x01010101u));
    const Ints centers = broadcast(center * 0x01010101);
    for (int64_t w = k_begin / word_codes(Container); w * word_codes(Container) < k_end; ++w) {
#pragma GCC unroll 8
        for (int v = 0; v < kColumnVectors; ++v) {
            const Ints word = columns.word(w, v);
#pragma GCC unroll 4
            for (int i = 0; i < kSteps; ++i) {
                const Ints codes = (word >> (Container * i)) & mask;
                store_vector(panel + i * kStepBytes + v * static_cast<int64_t>(sizeof(Ints)),
                             reinterpret_cast<Bytes>(codes) - reinterpret_cast<Bytes>(centers));
            }
        }
        panel += kSteps * kStepBytes;
    }
}

template <int Container>
inline void word_panel_of_words(const PackedColumns& columns, int64_t k_begin, int64_t k_end, const int32_t* zeros,
                                char* panel) {
    constexpr int kQuads = word_codes(Container) / kQuad;
    const Ints mask = broadcast(((1 << Container) - 1) * 0x00010001);
    Ints zero[kColumnVectors];
    for (int v = 0; v < kColumnVectors; ++v) zero[v] = load_vector<Ints>(zeros + v * kLanes) * 0x00010001;
    for (int64_t w = k_begin / word_codes(Container); w * word_codes(Container) < k_end; ++w) {
#pragma GCC unroll 8
        for (int v = 0; v < kColumnVectors; ++v) {
            const Ints word = columns.word(w, v);
            char* const out = panel + v * static_cast<int64_t>(sizeof(Ints));
#pragma GCC unroll 4
            for (int i = 0; i < kQuads; ++i) {
                store_vector(out + 2 * i * kStepBytes, subtract_words((word >> (Container * i)) & mask, zero[v]));
                store_vector(out + (2 * i + 1) * kStepBytes,
                             subtract_words((word >> (Container * i + 8)) & mask, zero[v]));
            }
        }
        panel += 2 * kQuads * kStepBytes;
    }
}

// Columns k_begin .. k_end, of one scale block, as words: code - zero point. The panel is made of the quads that hold
// them, 0 outside.
inline void word_panel(const Weight& weight, int64_t n, int64_t k_begin, int64_t k_end, char* panel) {
    int32_t zeros[kPanelColumns];
    column_zeros(weight, n, k_begin, zeros);
    if (are_whole_words(weight, k_begin, k_end)) {
        const PackedColumns columns(weight, n);
        switch (weight.container) {
            case 2: return word_panel_of_words<2>(columns, k_begin, k_end, zeros, panel);
            case 4: return word_panel_of_words<4>(columns, k_begin, k_end, zeros, panel);
            default: return word_panel_of_words<8>(columns, k_begin, k_end, zeros, panel);
        }
    }
    const int64_t first = k_begin / kQuad * kQuad;
    std::memset(panel, 0, static_cast<size_t>(ceil_div(k_end - first, kQuad) * 2 * kStepBytes));
    for (int64_t c = 0; c < smaller<int64_t>(kPanelColumns, weight.N - n); ++c)
        for (int64_t k = k_begin; k < k_end; ++k) {
            const int64_t quad = (k - first) / kQuad, i = (k - first) % kQuad;
            const int16_t value = static_cast<int16_t>(prepacked_code(weight, n + c, k) - zeros[c]);
            std::memcpy(panel + (2 * quad + i % 2) * kStepBytes + c * 4 + i / 2 * 2, &value, sizeof value);
        }
}

// panel[(k - begin) * kPanelColumns + c] = weight (n + c, k) for `count` columns from `begin`, a multiple of
// kPanelDepth. `words` is scratch of kWordPanelBytes + 2 * kStepBytes.
inline void forward_panel(const Weight& weight, int64_t n, int64_t begin, int64_t count, float* panel, char* words) {
    const int64_t size = weight.K / weight.G;
    for (int64_t k_begin = begin; k_begin < begin + count;) {
        const int64_t k_end = smaller(begin + count, (k_begin / size + 1) * size);
        word_panel(weight, n, k_begin, k_end, words);
        float scales[kPanelColumns];
        column_scales(weight, n, k_begin, scales);
        const char* pairs = words;
        for (int64_t quad = k_begin / kQuad * kQuad; quad < k_end; quad += kQuad) {
            float* const out = panel + (quad - begin) * kPanelColumns;
            for (int v = 0; v < kColumnVectors; ++v) {
                const Ints even = load_vector<Ints>(pairs + v * static_cast<int64_t>(sizeof(Ints)));
                const Ints odd = load_vector<Ints>(pairs + kStepBytes + v * static_cast<int64_t>(sizeof(Ints)));
                const Ints codes[kQuad] = {low_words(even), low_words(odd), high_words(even), high_words(odd)};
                const Vector scale = load(scales + v * kLanes);
                for (int64_t i = 0; i < kQuad; ++i)
                    if (quad + i >= k_begin && quad + i < k_end)
                        store(out + i * kPanelColumns + v * kLanes, to_floats(codes[i]) * scale);
            }
            pairs += 2 * kStepBytes;
        }
        k_begin = k_end;
    }
}

// ---- backward ----

// Lane 4 l + i of the result has byte i of lanes 4 l, 4 l + 2, 4 l + 1, 4 l + 3, from the lowest bits up: four rows'
// quads become four columns' rows.
inline Ints transpose_quads(Ints v) {
#if PREQUANT_AVX512
    const __m128i order = _mm_setr_epi8(0, 8, 4, 12, 1, 9, 5, 13, 2, 10, 6, 14, 3, 11, 7, 15);
    return reinterpret_cast<Ints>(_mm512_shuffle_epi8(reinterpret_cast<__m512i>(v), _mm512_broadcast_i32x4(order)));
#elif PREQUANT_AVX2
    const __m128i order = _mm_setr_epi8(0, 8, 4, 12, 1, 9, 5, 13, 2, 10, 6, 14, 3, 11, 7, 15);
    return reinterpret_cast<Ints>(
        _mm256_shuffle_epi8(reinterpret_cast<__m256i>(v), _mm256_broadcastsi128_si256(order)));
#else
    uint8_t bytes[16], moved[16];
    std::memcpy(bytes, &v, 16);
    for (int i = 0; i < 16; ++i) moved[i] = bytes[i / 4 + 4 * (i % 4 == 1 ? 2 : i % 4 == 2 ? 1 : i % 4)];
    return load_vector<Ints>(moved);
#endif
}

// The zero points of kPanelRows rows in the places where transpose_quads puts the rows: of each four, rows 0 and 1,
// then rows 2 and 3.
struct RowZeros {
    static constexpr int kVectors = kPanelRows / kLanes;
    Ints pairs[kVectors][2];

    RowZeros(const Weight& weight, int64_t n_begin, int64_t k) {
        if (weight.scale_rows == 1) {
            for (int v = 0; v < kVectors; ++v)
                pairs[v][0] = pairs[v][1] = broadcast(weight.zero_point[weight.block(0, k)] * 0x00010001);
            return;
        }
        alignas(64) int32_t zeros[2][kPanelRows];
        for (int64_t i = 0; i < kPanelRows; i += 2) {
            int32_t pair = 0;
            for (int64_t j = 0; j < 2; ++j)
                if (n_begin + i + j < weight.N) pair |= weight.zero_point[weight.block(n_begin + i + j, k)] << (16 * j);
            for (int64_t column = 0; column < 4; ++column) zeros[i / 2 % 2][i / 4 * 4 + column] = pair;
        }
        for (int v = 0; v < kVectors; ++v)
            for (int j = 0; j < 2; ++j) pairs[v][j] = load_vector<Ints>(zeros[j] + v * kLanes);
    }
};

// Rows n_begin .. n_begin + kPanelRows, columns k .. k + kPanelColumns as eight steps of words.
template <int Container>
inline void transposed_words(const Weight& weight, int64_t n_begin, int64_t k, char* panel) {
    constexpr int kVectors = kPanelRows / kLanes, kPerWord = word_codes(Container);
    const int64_t words = panel_words(weight.K, Container), size = weight.K / weight.G, first_word = k / kPerWord;
    const uint8_t* const packed = weight.packed + panel_offset(n_begin, 0, words);
    const Ints code_mask = broadcast(static_cast<int32_t>(((1u << Container) - 1) * 0x01010101u)),
               word_mask = broadcast(0x00ff00ff);
    RowZeros zeros(weight, n_begin, k);
    unrolled<kPanelColumns / kQuad>([&](auto index) PREQUANT_INLINE {
        constexpr int kFirst = index.value * kQuad;  // column of the panel
        if (weight.G > 1 && kFirst > 0 && (k + kFirst) % size == 0 && k + kFirst < weight.K)
            zeros = RowZeros(weight, n_begin, k + kFirst);
        const int64_t w = smaller(first_word + kFirst / kPerWord, words - 1);  // columns beyond K are never read
        unrolled<kVectors>([&](auto v) PREQUANT_INLINE {
            const Ints word = load_vector<Ints>(packed + w * kPanelBytes + v * static_cast<int64_t>(sizeof(Ints)));
            const Ints rows =
                transpose_quads((word >> (kFirst % kPerWord / static_cast<int>(kQuad) * Container)) & code_mask);
            const Ints pairs[2] = {subtract_words(rows & word_mask, zeros.pairs[v][0]),
                                   subtract_words((rows >> 8) & word_mask, zeros.pairs[v][1])};
            unrolled<2>([&](auto j) PREQUANT_INLINE {
                // 128 bits: rows kLanes * v + 4 * l + 2 * j and the next, four columns.
                unrolled<kLanes / 4>([&](auto l) PREQUANT_INLINE {
                    std::memcpy(panel + ((kLanes * v + 4 * l) / 2 + j) * kStepBytes + kFirst * 4,
                                reinterpret_cast<const char*>(&pairs[j]) + 16 * l, 16);
                });
            });
        });
    });
}

// Whether the quads of a row each have one zero point and scale.
inline bool has_whole_quads(const Weight& weight) { return weight.G == 1 || weight.K / weight.G % kQuad == 0; }

// Rows n_begin .. n_end (n_begin a multiple of kPanelRows) as words; requires has_whole_quads.
inline void transposed_word_panel(const Weight& weight, int64_t n_begin, int64_t n_end, int64_t k, char* panel) {
    for (int64_t n = n_begin; n < n_end; n += kPanelRows) {
        switch (weight.container) {
            case 2: transposed_words<2>(weight, n, k, panel); break;
            case 4: transposed_words<4>(weight, n, k, panel); break;
            default: transposed_words<8>(weight, n, k, panel);
        }
        panel += kPanelRows / 2 * kStepBytes;
    }
}

// panel[(n - begin) * kPanelColumns + c] = weight (n, k + c), rows begin .. begin + count. `words` is scratch as in
// forward_panel.
inline void backward_panel(const Weight& weight, int64_t begin, int64_t count, int64_t k, float* panel, char* words) {
    const int64_t columns = smaller<int64_t>(kPanelColumns, weight.K - k), size = weight.K / weight.G;
    const bool has_words = has_whole_quads(weight), has_row_scales = k / size == (k + columns - 1) / size;
    if (has_words) transposed_word_panel(weight, begin, begin + count, k, words);
    for (int64_t i = 0; i < count; ++i) {
        const int64_t n = begin + i;
        float* const row = panel + i * kPanelColumns;
        alignas(64) float scales[kPanelColumns];
        if (has_row_scales) {
            for (int v = 0; v < kColumnVectors; ++v)
                store(scales + v * kLanes, broadcast(weight.scale[weight.block(n, k)]));
        } else {
            for (int64_t c = 0; c < kPanelColumns; ++c)
                scales[c] = c < columns ? weight.scale[weight.block(n, k + c)] : 0.0f;
        }
        if (!has_words) {
            for (int64_t c = 0; c < kPanelColumns; ++c)
                row[c] = c < columns ? static_cast<float>(prepacked_code(weight, n, k + c) -
                                                          weight.zero_point[weight.block(n, k + c)]) *
                                           scales[c]
                                     : 0.0f;
            continue;
        }
        for (int v = 0; v < kColumnVectors; ++v) {
            const Ints pair = load_vector<Ints>(words + i / 2 * kStepBytes + v * static_cast<int64_t>(sizeof(Ints)));
            store(row + v * kLanes,
                  to_floats(i % 2 == 0 ? low_words(pair) : high_words(pair)) * load(scales + v * kLanes));
        }
    }
}

}  // namespace prequant::PREQUANT_LEVEL
