// One tile of the integer products: a few rows of a against a panel of kPanelColumns columns.
//
//   a       row i at a + i * stride: a lane of 32 bits a step, four unsigned bytes or two int16
//   panel   step s: kPanelColumns lanes, signed bytes or int16              step s of row i times column c adds up to
//                                                                           one int32
//
// avx512 keeps 12 x 32 sums in its registers, the others 3 x 32 or (portable) 3 x 16; columns beyond come in a second
// pass.
//
// Sums in    int32, which must hold the result; what lies between may wrap around.
// Limited by the multiply-adds; avx2 by the number of its instructions, 27 for a step of 3 x 32 x 4.
#pragma once

#include "integers.h"

namespace prequant::PREQUANT_LEVEL {

constexpr int kPanelColumns = 32;
constexpr int kColumnVectors = kPanelColumns / kLanes;
constexpr int kTileVectors = kColumnVectors < 4 ? kColumnVectors : 4;
constexpr int kIntegerTileRows = PREQUANT_AVX512 ? 12 : 3;

struct WordProduct {
    static constexpr int64_t kCodes = 2;  // of a lane
    static constexpr bool kHasRuns = false;
    static void dot(Ints& sum, const Ints& a, const Ints& w) { dot_words(sum, a, w); }
};

#if PREQUANT_AVX512 || PREQUANT_AVX2
struct ByteProduct {
    static constexpr int64_t kCodes = 4;
    static constexpr bool kHasRuns = kHasByteRuns;
    static void start(Ints& sum, const Ints& a, const Ints& w) { start_bytes(sum, a, w); }
    static void dot(Ints& sum, const Ints& a, const Ints& w) { dot_bytes(sum, a, w); }
};
#endif

template <int I>
struct Index {
    static constexpr int value = I;
    constexpr operator int() const { return I; }
};

// body(Index<0>{}), body(Index<1>{}), ...: no loop even before the optimizer, which keeps an array in registers only
// where each index is a constant from the start.
template <int Count, typename Body>
inline __attribute__((always_inline)) void unrolled(const Body& body) {
    if constexpr (Count > 0) {
        unrolled<Count - 1>(body);
        body(Index<Count - 1>{});
    }
}

#define PREQUANT_INLINE __attribute__((always_inline))

// Where a tile is: its rows of a (pointers three apart, as in tile.h) and the panel's step.
template <typename Product, int Rows>
struct TilePosition {
    static constexpr int kPointers = (Rows + 2) / 3;
    const char* rows[kPointers];
    int64_t stride;
    const Ints* panel;

    TilePosition(const char* a, int64_t row_stride, const Ints* first_step) : stride(row_stride), panel(first_step) {
        for (int i = 0; i < kPointers; ++i) rows[i] = a + 3 * i * stride;
    }

    // One step, added to the sums; or (IsFirst) the first one, which makes them.
    template <bool IsFirst>
    PREQUANT_INLINE void step(Ints (&sums)[Rows][kTileVectors]) {
#if PREQUANT_AVX512
        Ints weights[kTileVectors];  // loaded once: 12 rows share them
        unrolled<kTileVectors>([&](auto v) PREQUANT_INLINE { weights[v] = panel[v]; });
#else
        const Ints* const weights = panel;
#endif
        unrolled<Rows>([&](auto i) PREQUANT_INLINE {
            const Ints x = broadcast_lane(rows[i / 3] + i % 3 * stride);
            unrolled<kTileVectors>([&](auto v) PREQUANT_INLINE {
                if constexpr (IsFirst)
                    Product::start(sums[i][v], x, weights[v]);
                else
                    Product::dot(sums[i][v], x, weights[v]);
            });
        });
        unrolled<kPointers>([&](auto i) PREQUANT_INLINE { rows[i] += 4; });
        panel += kColumnVectors;
    }
};

template <int Rows, typename Body>
inline PREQUANT_INLINE void for_each_sum(const Body& body) {
    unrolled<Rows>([&](auto i)
                       PREQUANT_INLINE { unrolled<kTileVectors>([&](auto v) PREQUANT_INLINE { body(i, v); }); });
}

// finish(row, column, sum) takes the sums of kLanes columns from `column` on.
template <typename Product, int Rows, typename Finish>
inline void multiply_integer_tile(int64_t steps, const char* a, int64_t stride, const char* panel,
                                  const Finish& finish) {
    for (int first = 0; first < kColumnVectors; first += kTileVectors) {
        TilePosition<Product, Rows> position(a, stride, reinterpret_cast<const Ints*>(panel) + first);
        Ints sums[Rows][kTileVectors];
        for_each_sum<Rows>([&](auto i, auto v) PREQUANT_INLINE { sums[i][v] = Ints{}; });
        int64_t left = steps;
        if constexpr (Product::kHasRuns) {
            const auto add_sums = [&](const auto& run) PREQUANT_INLINE {
                for_each_sum<Rows>([&](auto i, auto v) PREQUANT_INLINE { add_run(sums[i][v], run[i][v]); });
            };
            for (; left >= kByteRun; left -= kByteRun) {
                Ints run[Rows][kTileVectors];
                position.template step<true>(run);
                unrolled<kByteRun - 1>([&](auto) PREQUANT_INLINE { position.template step<false>(run); });
                add_sums(run);
            }
            if (left > 0) {
                Ints run[Rows][kTileVectors];
                position.template step<true>(run);
                for (; left > 1; --left) position.template step<false>(run);
                add_sums(run);
            }
        } else {
            for (; left >= 2; left -= 2) {
                position.template step<false>(sums);
                position.template step<false>(sums);
            }
            if (left > 0) position.template step<false>(sums);
        }
        for_each_sum<Rows>([&](auto i, auto v) PREQUANT_INLINE { finish(i, (first + v) * kLanes, sums[i][v]); });
    }
}

// The same for any number of rows, in tiles of nearly equal height.
template <typename Product, typename Finish>
inline void multiply_integer_panel(int64_t rows, int64_t steps, const char* a, int64_t stride, const char* panel,
                                   const Finish& finish) {
    for (int64_t tiles = ceil_div(rows, kIntegerTileRows), i = 0; tiles > 0; --tiles) {
        const int64_t height = ceil_div(rows - i, tiles);
        const char* const from = a + i * stride;
        const auto shifted = [&](int64_t row, int64_t column, Ints sum) { finish(i + row, column, sum); };
        switch (height) {
            case 1: multiply_integer_tile<Product, 1>(steps, from, stride, panel, shifted); break;
            case 2: multiply_integer_tile<Product, 2>(steps, from, stride, panel, shifted); break;
            case 3: multiply_integer_tile<Product, 3>(steps, from, stride, panel, shifted); break;
#if PREQUANT_AVX512
            case 4: multiply_integer_tile<Product, 4>(steps, from, stride, panel, shifted); break;
            case 5: multiply_integer_tile<Product, 5>(steps, from, stride, panel, shifted); break;
            case 6: multiply_integer_tile<Product, 6>(steps, from, stride, panel, shifted); break;
            case 7: multiply_integer_tile<Product, 7>(steps, from, stride, panel, shifted); break;
            case 8: multiply_integer_tile<Product, 8>(steps, from, stride, panel, shifted); break;
            case 9: multiply_integer_tile<Product, 9>(steps, from, stride, panel, shifted); break;
            case 10: multiply_integer_tile<Product, 10>(steps, from, stride, panel, shifted); break;
            case 11: multiply_integer_tile<Product, 11>(steps, from, stride, panel, shifted); break;
            case 12: multiply_integer_tile<Product, 12>(steps, from, stride, panel, shifted); break;
#endif
            default: break;
        }
        i += height;
    }
}

}  // namespace prequant::PREQUANT_LEVEL
