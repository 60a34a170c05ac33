// Rows of floats rounded to int16 in blocks of kBlock columns with a step of their own: the activations of integer
// products that keep 16 bits.
//
//   a, a row       | 128 values      | 128 values      | ...
//                  step = max|a| / 32767, value = rint(a / step): wrong by half a step at most
#pragma once

#include "weight_panel.h"

namespace prequant::PREQUANT_LEVEL {

constexpr int64_t kBlock = 128;
constexpr int kBlockTop = 32767;
static_assert(kBlock * kBlockTop * 255 <= INT32_MAX, "a block's products must fit int32");

struct BlockRows {
    int16_t* values;  // (M, stride), 0 beyond the depth
    float* steps;     // (M, blocks)
    int64_t stride, blocks;
};

// One block: up to kBlock values, already floats. Returns the step.
inline float round_block(const float* values, int64_t count, int16_t* rounded) {
    uint32_t magnitude = 0;  // as integers, NaN and Inf are the largest
    for (int64_t i = 0; i < count; ++i) {
        const uint32_t bits = bits_of(values[i]) & 0x7fffffff;
        magnitude = bits > magnitude ? bits : magnitude;
    }
    std::memset(rounded, 0, kBlock * sizeof(int16_t));
    if (magnitude == 0) return 0;
    // The row's results are NaN, and gradient scalers see it.
    if (magnitude >= 0x7f800000u) return float_of(kNanBits);
    const float largest = float_of(magnitude);
    if (largest < 0x1p-100f) {  // the inverse would not fit float32
        const double inverse = kBlockTop / static_cast<double>(largest);
        for (int64_t i = 0; i < count; ++i)
            rounded[i] = static_cast<int16_t>(__builtin_rint(static_cast<double>(values[i]) * inverse));
        return static_cast<float>(static_cast<double>(largest) / kBlockTop);
    }
    const float inverse = kBlockTop / largest;
    for (int64_t i = 0; i < count; ++i)
        rounded[i] = static_cast<int16_t>(static_cast<int32_t>(round_even(values[i] * inverse)));
    return largest / kBlockTop;
}

// Rows m .. m + rows of a, times a factor for each column where `factors` is given; `in_quads`: in the order of forward
// panels.
inline void round_rows(const Matrix& a, int64_t m, int64_t rows, const float* factors, bool in_quads,
                       const BlockRows& out) {
    const int64_t depth = a.cols;
    parallel_for(rows, depth / 2, [&](int64_t begin, int64_t end) {
        alignas(64) float values[kBlock];
        for (int64_t i = begin; i < end; ++i)
            for (int64_t b = 0; b < out.blocks; ++b) {
                const int64_t k = b * kBlock, count = smaller(kBlock, depth - k);
                const float* block = as_floats(a.data, a.dtype, (m + i) * depth + k, count, values);
                if (factors) {
                    for (int64_t j = 0; j < count; ++j) values[j] = block[j] * factors[k + j];
                    block = values;
                }
                int16_t* const rounded = out.values + i * out.stride + k;
                out.steps[i * out.blocks + b] = round_block(block, count, rounded);
                for (int64_t quad = 0; in_quads && quad < kBlock; quad += kQuad) {
                    uint64_t four;  // k, k + 1, k + 2, k + 3  ->  k, k + 2, k + 1, k + 3
                    std::memcpy(&four, rounded + quad, sizeof four);
                    four = (four & 0xffff00000000ffffu) | (four << 16 & 0x0000ffff00000000u) |
                           (four >> 16 & 0x00000000ffff0000u);
                    std::memcpy(rounded + quad, &four, sizeof four);
                }
            }
    });
}

}  // namespace prequant::PREQUANT_LEVEL
