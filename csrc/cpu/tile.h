// c += a b on one register tile: the float32 product that every float kernel shares.
//
//             kTileColumns                    A row of b is two vectors; an accumulator row of c stays in registers
//          b  +-----------+                   while b streams by.
//             |  depth    |                   avx512          12 x 32: 24 accumulators of 32 registers
//    a +------+-----------+                   avx2, avxvnni    6 x 16: 12 of 16
//      |      |     c     | up to kTileRows   portable         6 x 8
//      +------+-----------+
//
// Sums in    float32, fused but on the portable level: runs of kRunDepth in the order of depth, each added to c. A
//            single run as long as K would lose as much again as a library's product does.
#pragma once

#include "numbers.h"

namespace prequant::PREQUANT_LEVEL {

constexpr int kTileRows = PREQUANT_AVX512 ? 12 : 6;
constexpr int kTileColumns = 2 * kLanes;
constexpr int64_t kRunDepth = PREQUANT_AVX512 || PREQUANT_AVX2 ? 64 : 32;  // unfused, each step rounds twice

// Element (row i, depth k) of a is a[i * stride + k], or a[k * stride + i] where Transposed.
template <int Rows, bool Transposed>
void multiply_tile(int64_t depth, const float* a, int64_t stride, const float* b, int64_t b_stride, float* c,
                   int64_t c_stride) {
    // Row pointers three apart: rows 3i + 1 and 3i + 2 are then addresses with a scaled index, and all fit the general
    // registers.
    constexpr int kPointers = (Rows + 2) / 3;
    const float* rows[kPointers];
    for (int i = 0; i < kPointers; ++i) rows[i] = a + 3 * i * stride;
    for (int64_t begin = 0; begin < depth; begin += kRunDepth) {
        Vector sums[Rows][2];
        for (int i = 0; i < Rows; ++i) sums[i][0] = sums[i][1] = broadcast(0.0f);
        for (int64_t k = smaller(kRunDepth, depth - begin); k > 0; --k) {
            const Vector b0 = load(b), b1 = load(b + kLanes);
            b += b_stride;
#pragma GCC unroll 12
            for (int i = 0; i < Rows; ++i) {
                const Vector x = broadcast(Transposed ? a[i] : rows[i / 3][i % 3 * stride]);
                sums[i][0] = multiply_add(x, b0, sums[i][0]);
                sums[i][1] = multiply_add(x, b1, sums[i][1]);
            }
            if constexpr (Transposed)
                a += stride;
            else
                for (int i = 0; i < kPointers; ++i) ++rows[i];
        }
        for (int i = 0; i < Rows; ++i)
            for (int v = 0; v < 2; ++v)
                store(c + i * c_stride + v * kLanes, load(c + i * c_stride + v * kLanes) + sums[i][v]);
    }
}

// c (rows, kTileColumns) += a b for any number of rows, in tiles of nearly equal height.
template <bool Transposed>
inline void multiply_panel(int64_t rows, int64_t depth, const float* a, int64_t stride, const float* b,
                           int64_t b_stride, float* c, int64_t c_stride) {
    using Multiply = void (*)(int64_t, const float*, int64_t, const float*, int64_t, float*, int64_t);
    static constexpr Multiply kByRows[] = {
        nullptr,
        multiply_tile<1, Transposed>,
        multiply_tile<2, Transposed>,
        multiply_tile<3, Transposed>,
        multiply_tile<4, Transposed>,
        multiply_tile<5, Transposed>,
        multiply_tile<6, Transposed>,
#if PREQUANT_AVX512
        multiply_tile<7, Transposed>,
        multiply_tile<8, Transposed>,
        multiply_tile<9, Transposed>,
        multiply_tile<10, Transposed>,
        multiply_tile<11, Transposed>,
        multiply_tile<12, Transposed>,
#endif
    };
    for (int64_t tiles = ceil_div(rows, kTileRows), i = 0; tiles > 0; --tiles) {
        const int64_t height = ceil_div(rows - i, tiles);
        kByRows[height](depth, a + (Transposed ? i : i * stride), stride, b, b_stride, c + i * c_stride, c_stride);
        i += height;
    }
}

}  // namespace prequant::PREQUANT_LEVEL
