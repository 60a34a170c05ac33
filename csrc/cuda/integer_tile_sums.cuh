// A block's tile of the integer product of many tokens: which thread has which sums, and what becomes of them.
//
//   a warp's part      4 warps share the columns of y, 2 the rows:      a lane's 4 sums of a strip and 8 tokens
//                      2 strips of 16 columns x half of the rows            row g      tokens 2t, 2t + 1    sums 0, 1
//                      (8 or 4 tiles of 8 tokens)                           row g + 8  tokens 2t, 2t + 1    sums 2, 3
//
//   once all columns of W have been multiplied
//     share_for_finish    what the warps need of each other, to shared memory: each token's scale and zero point, and
//                         the sums of the weight's codes
//     scale_sums          exact sums -> zero points -> scales: float32
//     add_outliers        the outliers of axis 1, on tensor cores where y has 16-bit floats
//     write_tile          through shared memory, kFinishRows rows at a time, to finish_tile (integer_epilogue.cuh);
//                         where columns are cut into pieces, to scratch as int32
//
// Rounds     as integer_epilogue.cuh says.
#pragma once

#include "integer_epilogue.cuh"

namespace prequant::cuda {

constexpr int kTileThreads = 256, kTileColumns = 128, kTileStrips = kTileColumns / kStripRows;
constexpr int kColumnWarps = 4, kWarpStrips = kTileStrips / kColumnWarps;
constexpr int kFinishRows = 16, kTilePitch = kTileColumns + kQuad;
static_assert(kWarpStrips == 2);  // of the two strips each of two warps adds up the codes of one

// The part of a tile of y that a thread's warp makes, and within it the thread's own numbers.
template <int kRows>
struct TilePart {
    static constexpr int kWarpRows = kRows / 2, kTokenTiles = kWarpRows / kTileTokens;
    int lane, first_strip, half;  // half: of the tile's rows
    int64_t m0, n0;               // of the tile
    int64_t M, N, K, G;           // read here alone: read again after every barrier, they make ptxas spill on sm_100

    PREQUANT_DEVICE explicit TilePart(const IntegerProduct& product) {
        const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp;
        lane = thread % kWarp, first_strip = warp % kColumnWarps * kWarpStrips, half = warp / kColumnWarps;
        m0 = int64_t(blockIdx.x) * kRows, n0 = int64_t(blockIdx.y) * kTileColumns;
        M = product.x.M, N = product.weight.N, K = product.weight.K, G = product.weight.G;
    }
    PREQUANT_DEVICE int token(int tile, int odd) const {
        return half * kWarpRows + tile * kTileTokens + lane % 4 * 2 + odd;
    }
    PREQUANT_DEVICE int column(int strip, int high) const {
        return (first_strip + strip) * kStripRows + lane / 4 + 8 * high;
    }
};

// values[strip][tile][2 * high + odd] is of column(strip, high) and token(tile, odd).
template <typename T, int kRows>
using TileValues = T[kWarpStrips][TilePart<kRows>::kTokenTiles][4];

// The sums so far. With groups, sums and code_sums are those of the group at hand, floats those of the groups before.
template <int kRows, bool kIsGrouped>
struct TileSums {
    static constexpr int kFloatStrips = kIsGrouped ? kWarpStrips : 1,
                         kFloatTiles = kIsGrouped ? TilePart<kRows>::kTokenTiles : 1;
    TileValues<int32_t, kRows> sums = {};
    uint32_t code_sums[kFloatStrips][2] = {};  // of this lane's columns of W
    float floats[kFloatStrips][kFloatTiles][4] = {};
};

// The sum of the four lanes that share a row of W.
PREQUANT_DEVICE uint32_t sum_over_row(uint32_t sum) {
    sum += __shfl_xor_sync(kAllLanes, sum, 1);
    sum += __shfl_xor_sync(kAllLanes, sum, 2);
    return sum;
}

// Group g has been multiplied: its sums, with zero points and scale, are added to the floats, and begin again at 0.
template <int kRows>
PREQUANT_DEVICE void fold_group(const IntegerProduct& product, const TilePart<kRows>& part, int64_t g,
                                TileSums<kRows, true>& sums) {
    const Activations& x = product.x;
    const Weight& weight = product.weight;
    float scale[kWarpStrips][2] = {};
    int zero_point[kWarpStrips][2] = {}, code_sum[kWarpStrips][2];
#pragma unroll
    for (int strip = 0; strip < kWarpStrips; ++strip)
#pragma unroll
        for (int high = 0; high < 2; ++high) {
            const int64_t n = part.n0 + part.column(strip, high);
            if (n < part.N) {
                const int64_t block = (weight.scale_rows == 1 ? 0 : n) * part.G + g;
                scale[strip][high] = weight.scale[block], zero_point[strip][high] = weight.zero_point[block];
            }
            code_sum[strip][high] =
                static_cast<int32_t>(sum_over_row(sums.code_sums[strip][high]) >> (high * kHighShift<4>));
            sums.code_sums[strip][high] = 0;
        }
#pragma unroll
    for (int tile = 0; tile < part.kTokenTiles; ++tile)
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
            const int64_t m = part.m0 + part.token(tile, odd);
            const int32_t offset = m < part.M ? token_offset(x, part.G, m, g, product.group_size) : 0;
            const int token_zero_point = m < part.M ? x.zero_point[x.per_token ? m : 0] : 0;
#pragma unroll
            for (int strip = 0; strip < kWarpStrips; ++strip)
#pragma unroll
                for (int high = 0; high < 2; ++high) {
                    int32_t& sum = sums.sums[strip][tile][2 * high + odd];
                    const int32_t exact =
                        product_of(sum >> (high * kHighShift<4>), token_zero_point, code_sum[strip][high]);
                    const auto value = static_cast<float>(add_zero_points(exact, zero_point[strip][high], offset));
                    float& total = sums.floats[strip][tile][2 * high + odd];
                    total = __fadd_rn(total, __fmul_rn(value, scale[strip][high]));
                    sum = 0;
                }
        }
}

// ---- once all columns have been multiplied ----

struct Token {
    int32_t zero_point, offset;
    float scale;
};

// Shared memory once the products are made.
template <int kRows>
struct TileEnd {
    float sums[kFinishRows * kTilePitch];
    float scratch[kFinishFloats<kFinishRows, kTileColumns>];
    int32_t code_sums[kTileColumns];
    Token tokens[kRows];
};

template <int kRows, bool kIsGrouped>
PREQUANT_DEVICE void share_for_finish(const IntegerProduct& product, const TilePart<kRows>& part,
                                      const TileSums<kRows, kIsGrouped>& sums, TileEnd<kRows>& end) {
    const Activations& x = product.x;
    for (int row = static_cast<int>(threadIdx.x); row < kRows; row += kTileThreads) {
        const int64_t m = part.m0 + row < part.M ? part.m0 + row : part.M - 1, token = x.per_token ? m : 0;
        end.tokens[row] = {x.zero_point[token], kIsGrouped ? 0 : token_offset(x, 1, m, 0, part.K), x.scale[token]};
    }
    if constexpr (!kIsGrouped) {
#pragma unroll
        for (int high = 0; high < 2; ++high) {
            const uint32_t sum = sum_over_row(sums.code_sums[0][high]);
            if (part.lane % 4 == 0)
                end.code_sums[part.column(part.half, high)] = static_cast<int32_t>(sum >> (high * kHighShift<4>));
        }
    }
    __syncthreads();
}

// values: the sums in float32, times the tokens' scales already unless add_outliers has codes to add before. Where
// columns are cut into pieces: the bits of the int32 products.
template <int kRows, bool kIsGrouped>
PREQUANT_DEVICE void scale_sums(const Weight& weight, const TilePart<kRows>& part,
                                const TileSums<kRows, kIsGrouped>& sums, const TileEnd<kRows>& end, bool makes_pieces,
                                bool has_columns, bool has_raw_columns, TileValues<float, kRows>& values) {
    int32_t code_sum[kWarpStrips][2] = {};
    float scale[kWarpStrips][2] = {};
    int zero_point[kWarpStrips][2] = {};
#pragma unroll
    for (int strip = 0; strip < kWarpStrips && !kIsGrouped; ++strip)
#pragma unroll
        for (int high = 0; high < 2; ++high) {
            const int column = part.column(strip, high);
            const int64_t n = part.n0 + column < part.N ? part.n0 + column : part.N - 1,
                          block = weight.scale_rows == 1 ? 0 : n;
            code_sum[strip][high] = end.code_sums[column];
            if (!makes_pieces)
                scale[strip][high] = weight.scale[block], zero_point[strip][high] = weight.zero_point[block];
        }
    // Tokens outside: six registers at a time, where all of them would take 48.
#pragma unroll
    for (int tile = 0; tile < part.kTokenTiles; ++tile)
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
            const Token token = end.tokens[part.token(tile, odd)];
#pragma unroll
            for (int i = 0; i < 2 * kWarpStrips; ++i) {
                const int strip = i / 2, high = i % 2;
                float& value = values[strip][tile][2 * high + odd];
                if constexpr (kIsGrouped) {
                    value = sums.floats[strip][tile][2 * high + odd];
                } else {
                    const int32_t exact = product_of(sums.sums[strip][tile][2 * high + odd] >> (high * kHighShift<4>),
                                                     token.zero_point, code_sum[strip][high]);
                    const auto sum = static_cast<float>(add_zero_points(exact, zero_point[strip][high], token.offset));
                    value = makes_pieces ? __int_as_float(exact) : __fmul_rn(sum, scale[strip][high]);
                }
                if (!makes_pieces && (!has_columns || has_raw_columns)) value = __fmul_rn(value, token.scale);
            }
        }
}

// Whether add_outliers adds the outliers: those of axis 1, multiplied as y's 16-bit floats. Codes less their zero point
// are exact in both; sm_75 has no bfloat16.
PREQUANT_DEVICE bool multiplies_outliers(const Epilogue& epilogue) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
    if (epilogue.y.dtype == Dtype::bfloat16) return false;
#endif
    return epilogue.y.dtype != Dtype::float32 && epilogue.outliers.r > 0 && epilogue.outliers.axis == 1;
}

// values += outlier_weight x[:, dims]: raw floats, or codes less their zero point, which x_scale has yet to multiply.
template <typename T, int kRows>
PREQUANT_DEVICE void multiply_outliers(const Epilogue& epilogue, const TilePart<kRows>& part, TileEnd<kRows>& end,
                                       TileValues<float, kRows>& values) {
    constexpr int kPitch = 24;  // of 16 numbers: eight rows and four pairs of a fragment meet 32 different banks
    static_assert(sizeof(T) * kPitch * (kTileColumns + kRows) <= sizeof(end.sums) + sizeof(end.scratch));
    T* const weights = reinterpret_cast<T*>(&end);  // sums and scratch are not in use yet
    T* const tokens = weights + kTileColumns * kPitch;
    const Outliers& outliers = epilogue.outliers;
    const Activations& codes = epilogue.source.codes;
    const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp;
    for (int64_t first = 0; first < outliers.r; first += kOutlierStep) {
        if (first > 0) __syncthreads();
#pragma unroll 1
        for (int e = thread; e < kTileColumns * kOutlierStep; e += kTileThreads) {
            const int64_t n = part.n0 + e / kOutlierStep, j = first + e % kOutlierStep;
            weights[e / kOutlierStep * kPitch + e % kOutlierStep] =
                from_float<T>(n < epilogue.y.cols && j < outliers.r ? outliers.values[n * outliers.r + j] : 0);
        }
#pragma unroll 1
        for (int e = thread; e < kRows * kOutlierStep; e += kTileThreads) {
            const int64_t m = part.m0 + e / kOutlierStep, j = first + e % kOutlierStep;
            float number = 0;
            if (m < epilogue.y.rows && j < outliers.r) {
                const int64_t k = outliers.dims[j];
                if (k >= 0 && k < epilogue.source.cols())
                    number = epilogue.source.has_codes()
                                 ? static_cast<float>(codes.codes[m * codes.K + k] -
                                                      codes.zero_point[epilogue.source.token(m)])
                                 : value_at(epilogue.source, m, k);
            }
            tokens[e / kOutlierStep * kPitch + e % kOutlierStep] = from_float<T>(number);
        }
        __syncthreads();
        uint32_t a[kWarpStrips][4];
#pragma unroll
        for (int strip = 0; strip < kWarpStrips; ++strip)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                a[strip][i] = load<uint32_t>(weights + part.column(strip, i % 2) * kPitch + i / 2 * 8 + lane % 4 * 2);
#pragma unroll
        for (int tile = 0; tile < part.kTokenTiles; ++tile) {
            uint32_t b[2];
#pragma unroll
            for (int i = 0; i < 2; ++i)
                b[i] = load<uint32_t>(tokens + (part.half * part.kWarpRows + tile * kTileTokens + lane / 4) * kPitch +
                                      i * 8 + lane % 4 * 2);
#pragma unroll
            for (int strip = 0; strip < kWarpStrips; ++strip) mma_m16n8k16<T>(values[strip][tile], a[strip], b);
        }
    }
}

// values += the outliers' products, and then, unless these were of raw floats, values *= the tokens' scales.
template <int kRows>
PREQUANT_DEVICE void add_outliers(const Epilogue& epilogue, const TilePart<kRows>& part, TileEnd<kRows>& end,
                                  bool has_raw_columns, TileValues<float, kRows>& values) {
    if (epilogue.y.dtype == Dtype::float16)
        multiply_outliers<__half>(epilogue, part, end, values);
    else
        multiply_outliers<__nv_bfloat16>(epilogue, part, end, values);
#pragma unroll
    for (int tile = 0; tile < part.kTokenTiles; ++tile)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float scale = has_raw_columns ? 1 : end.tokens[part.token(tile, i % 2)].scale;
#pragma unroll
            for (int strip = 0; strip < kWarpStrips; ++strip) values[strip][tile][i] *= scale;
        }
}

// values, and what finish_tile adds to them, to y; or the bits of the products to their piece in scratch.
template <int kRows>
PREQUANT_DEVICE void write_tile(const IntegerProduct& product, const Epilogue& epilogue, const TilePart<kRows>& part,
                                TileEnd<kRows>& end, bool makes_pieces, bool has_columns,
                                const TileValues<float, kRows>& values) {
    for (int first_row = 0; first_row < kRows; first_row += kFinishRows) {
        __syncthreads();  // the tile's place holds kFinishRows rows at a time
#pragma unroll
        for (int tile = 0; tile < part.kTokenTiles; ++tile)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int row = part.token(tile, i % 2) - first_row;
#pragma unroll
                for (int strip = 0; strip < kWarpStrips; ++strip)
                    if (row >= 0 && row < kFinishRows)
                        end.sums[row * kTilePitch + part.column(strip, i / 2)] = values[strip][tile][i];
            }
        __syncthreads();
        const int64_t m0 = part.m0 + first_row;
        if (makes_pieces) {
            for (int e = static_cast<int>(threadIdx.x); e < kFinishRows * kTileColumns / kQuad; e += kTileThreads) {
                const int row = e / (kTileColumns / kQuad), column = e % (kTileColumns / kQuad) * kQuad;
                if (m0 + row < part.M && part.n0 + column < part.N)
                    store_products(product, blockIdx.z, m0 + row, part.n0 + column,
                                   load<Vector<int32_t, kQuad>>(end.sums + row * kTilePitch + column));
            }
        } else {
            finish_tile<kTileThreads, kFinishRows, kTileColumns>(
                epilogue, m0, part.n0, has_columns, end.scratch, [&](int row, int column) {
                    const auto sum = load<Vector<float, kQuad>>(end.sums + row * kTilePitch + column);
                    return QuadSums{{sum.at[0], sum.at[1], sum.at[2], sum.at[3]}};
                });
        }
    }
}

// From the sums of all columns to y, or to their piece in scratch. The place of TileEnd is free.
template <int kRows, bool kIsGrouped>
PREQUANT_DEVICE void finish_sums(const IntegerProduct& product, const Epilogue& epilogue, const TilePart<kRows>& part,
                                 const TileSums<kRows, kIsGrouped>& sums) {
    const bool makes_pieces = !kIsGrouped && product.pieces != nullptr;
    // Outliers of axis 1 are multiplied by tensor cores, here; otherwise finish_tile does it.
    const bool has_columns = !makes_pieces && multiplies_outliers(epilogue);
    const bool has_raw_columns = has_columns && !epilogue.source.has_codes();
    auto& end = *dynamic_shared<TileEnd<kRows>>();
    TileValues<float, kRows> values;
    share_for_finish(product, part, sums, end);
    scale_sums(product.weight, part, sums, end, makes_pieces, has_columns, has_raw_columns, values);
    if (has_columns) add_outliers(epilogue, part, end, has_raw_columns, values);
    write_tile(product, epilogue, part, end, makes_pieces, has_columns, values);
}

}  // namespace prequant::cuda
