// Canonical rows <-> panels of 16 rows whose 32-bit words lie side by side, their codes in another order (formats.h
// draws both).
//                                                                                 Meaning: reference.prepack, unprepack
// Limited by the bytes moved.
#pragma once

#include "numbers.h"

namespace prequant::PREQUANT_LEVEL {

constexpr int64_t kPrepackWords = 256;  // of a row at a time

// A canonical word has code i at bit i * Container.
template <int Container>
inline void words_from_canonical(const uint32_t* canonical, int64_t count, uint32_t* words) {
    constexpr uint32_t kMask = (1u << Container) - 1;
    for (int64_t w = 0; w < count; ++w) {
        uint32_t word = 0;
        for (int i = 0; i < word_codes(Container); ++i)
            word |= (canonical[w] >> (Container * i) & kMask) << word_shift(i, Container);
        words[w] = word;
    }
}

template <int Container>
inline void words_to_canonical(const uint32_t* words, int64_t count, uint32_t* canonical) {
    constexpr uint32_t kMask = (1u << Container) - 1;
    for (int64_t w = 0; w < count; ++w) {
        uint32_t word = 0;
        for (int i = 0; i < word_codes(Container); ++i)
            word |= (words[w] >> word_shift(i, Container) & kMask) << (Container * i);
        canonical[w] = word;
    }
}

template <int Container>
inline int32_t sum_of_codes(const uint32_t* words, int64_t count) {
    constexpr uint32_t kMask = (1u << Container) - 1;
    uint32_t sum = 0;
    for (int64_t w = 0; w < count; ++w)
        for (int i = 0; i < word_codes(Container); ++i) sum += words[w] >> (Container * i) & kMask;
    return static_cast<int32_t>(sum);
}

template <int Container>
inline void prepack_rows(const uint8_t* packed, int64_t N, int64_t K, uint8_t* prepacked) {
    const int64_t row_bytes = packed_row_bytes(K, Container), words = panel_words(K, Container);
    parallel_for(ceil_div(N, kPanelRows), kPanelRows * words, [&](int64_t begin, int64_t end) {
        uint32_t canonical[kPrepackWords], moved[kPrepackWords];
        for (int64_t n = begin * kPanelRows; n < end * kPanelRows; ++n) {
            int32_t sum = 0;
            for (int64_t first = 0; first < words; first += kPrepackWords) {
                const int64_t count = smaller(kPrepackWords, words - first);
                const int64_t bytes = n < N ? smaller(4 * count, row_bytes - 4 * first) : 0;
                std::memset(canonical, 0, static_cast<size_t>(4 * count));
                if (bytes > 0) std::memcpy(canonical, packed + n * row_bytes + 4 * first, static_cast<size_t>(bytes));
                words_from_canonical<Container>(canonical, count, moved);
                sum += sum_of_codes<Container>(moved, count);
                for (int64_t w = 0; w < count; ++w)
                    std::memcpy(prepacked + panel_offset(n, first + w, words), moved + w, 4);
            }
            std::memcpy(prepacked + panel_offset(n, words, words), &sum, 4);
        }
    });
}

template <int Container>
inline void unprepack_rows(const uint8_t* prepacked, int64_t N, int64_t K, uint8_t* packed) {
    const int64_t row_bytes = packed_row_bytes(K, Container), words = panel_words(K, Container);
    parallel_for(N, words, [&](int64_t begin, int64_t end) {
        uint32_t canonical[kPrepackWords], moved[kPrepackWords];
        for (int64_t n = begin; n < end; ++n)
            for (int64_t first = 0; first < words; first += kPrepackWords) {
                const int64_t count = smaller(kPrepackWords, words - first);
                for (int64_t w = 0; w < count; ++w)
                    std::memcpy(moved + w, prepacked + panel_offset(n, first + w, words), 4);
                words_to_canonical<Container>(moved, count, canonical);
                std::memcpy(packed + n * row_bytes + 4 * first, canonical,
                            static_cast<size_t>(smaller(4 * count, row_bytes - 4 * first)));
            }
    });
}

inline void prepack(const uint8_t* packed, int64_t N, int64_t K, int container, uint8_t* prepacked, Stream) {
    switch (container) {
        case 2: return prepack_rows<2>(packed, N, K, prepacked);
        case 4: return prepack_rows<4>(packed, N, K, prepacked);
        default: return prepack_rows<8>(packed, N, K, prepacked);
    }
}

inline void unprepack(const uint8_t* prepacked, int64_t N, int64_t K, int container, uint8_t* packed, Stream) {
    switch (container) {
        case 2: return unprepack_rows<2>(prepacked, N, K, packed);
        case 4: return unprepack_rows<4>(prepacked, N, K, packed);
        default: return unprepack_rows<8>(prepacked, N, K, packed);
    }
}

}  // namespace prequant::PREQUANT_LEVEL
