// Rows of packed codes to bytes and back; the layout is formats.h's.
#pragma once

#include "numbers.h"

namespace prequant::PREQUANT_LEVEL {

// Codes begin .. begin + count of a canonical row, a byte each; slow where begin lies inside a byte.
inline void unpack_codes(const uint8_t* row, int64_t begin, int64_t count, int container, uint8_t* codes) {
    if (count == 0) return;  // an empty tensor's data is null, which memcpy may not be given
    const int per_byte = 8 / container;
    if (begin % per_byte != 0) {
        for (int64_t k = 0; k < count; ++k) codes[k] = static_cast<uint8_t>(code_at(row, begin + k, container));
        return;
    }
    const uint8_t* bytes = row + begin / per_byte;
    const int64_t whole = count / per_byte;
    if (container == 8) {
        std::memcpy(codes, bytes, static_cast<size_t>(count));
    } else if (container == 4) {
        for (int64_t j = 0; j < whole; ++j) {
            codes[2 * j] = bytes[j] & 15;
            codes[2 * j + 1] = bytes[j] >> 4;
        }
    } else {
        for (int64_t j = 0; j < whole; ++j) {
            codes[4 * j] = bytes[j] & 3;
            codes[4 * j + 1] = bytes[j] >> 2 & 3;
            codes[4 * j + 2] = bytes[j] >> 4 & 3;
            codes[4 * j + 3] = bytes[j] >> 6;
        }
    }
    for (int64_t k = whole * per_byte; k < count; ++k) codes[k] = static_cast<uint8_t>(code_at(bytes, k, container));
}

// The inverse, from the row's first byte that holds code `begin`; padding bits of the last byte are 0.
inline void pack_codes(const uint8_t* codes, int64_t begin, int64_t count, int container, uint8_t* row) {
    if (count == 0) return;
    const int per_byte = 8 / container;
    uint8_t* bytes = row + begin / per_byte;
    const int64_t whole = count / per_byte;
    if (container == 8) {
        std::memcpy(bytes, codes, static_cast<size_t>(count));
    } else if (container == 4) {
        for (int64_t j = 0; j < whole; ++j) bytes[j] = static_cast<uint8_t>(codes[2 * j] | codes[2 * j + 1] << 4);
    } else {
        for (int64_t j = 0; j < whole; ++j)
            bytes[j] = static_cast<uint8_t>(codes[4 * j] | codes[4 * j + 1] << 2 | codes[4 * j + 2] << 4 |
                                            codes[4 * j + 3] << 6);
    }
    if (whole * per_byte == count) return;
    int last = 0;
    for (int64_t k = whole * per_byte; k < count; ++k)
        last |= codes[k] << static_cast<int>((k - whole * per_byte) * container);
    bytes[whole] = static_cast<uint8_t>(last);
}

// body(begin, end, block) for the parts of row n's columns k_begin .. k_end that share a scale; `block` indexes scale
// and zero_point.
template <typename Body>
inline void for_each_block(int64_t n, int64_t k_begin, int64_t k_end, int64_t K, int64_t scale_rows, int64_t G,
                           const Body& body) {
    const int64_t first = (scale_rows == 1 ? 0 : n) * G, size = K / G;
    for (int64_t begin = k_begin; begin < k_end;) {
        const int64_t g = begin / size, end = smaller(k_end, (g + 1) * size);
        body(begin, end, first + g);
        begin = end;
    }
}

// (code - zero_point) * scale of row n, columns begin .. begin + count, through `codes`, scratch of `count` bytes.
// A null scale counts as 1.
inline void dequantize_codes(const Weight& weight, int64_t n, int64_t begin, int64_t count, uint8_t* codes,
                             float* values) {
    unpack_codes(weight.row(n), begin, count, weight.container, codes);
    for_each_block(n, begin, begin + count, weight.K, weight.scale_rows, weight.G,
                   [&](int64_t k_begin, int64_t k_end, int64_t block) {
                       const int zero = weight.zero_point[block];
                       const float scale = weight.scale ? weight.scale[block] : 1.0f;
                       for (int64_t k = k_begin - begin; k < k_end - begin; ++k)
                           values[k] = static_cast<float>(codes[k] - zero) * scale;
                   });
}

}  // namespace prequant::PREQUANT_LEVEL
