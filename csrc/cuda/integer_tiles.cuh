// The integer product of many tokens: 128 (or 64) rows of x times 128 rows of W, in steps of 128 columns.
//
//   W    8 strips x 2 chunks a step, cp.async, 3 stages         warps      n 0..31 | 32..63 | 64..95 | 96..127
//   x    128 rows x 8 pieces of 16 codes a step, through        m 0..63       0    |   1    |   2    |   3
//        registers a step ahead, 2 buffers                      m 64..127     4    |   5    |   6    |   7
//
//   A warp multiplies 2 strips by 8 (or 4) tiles of 8 tokens. Two warps share them: each adds up the codes of one, half
//   an extra dp4a a word and row. (A row of ones in x, as strips have it, would cost an eighth more products here.)
//
// Requires   4-bit containers; groups, and the ranges of pieces, are whole chunks.
#pragma once

#include "integer_epilogue.cuh"

namespace prequant::cuda {

constexpr int kTileThreads = 256, kTileColumns = 128, kTileStrips = kTileColumns / kStripRows, kStepChunks = 2,
              kStages = 3;
constexpr int kStepPieces = kStepChunks * kChunkPieces, kFinishRows = 16, kTilePitch = kTileColumns + kQuad;
constexpr int64_t kStepColumns = kStepChunks * kChunkColumns;
constexpr int kColumnWarps = 4, kWarpStrips = kTileStrips / kColumnWarps;

// Blocks of ungrouped tiles on a multiprocessor: registers are kept to 128 for two where its shared memory has room for
// two, 160 KiB or more.
#if defined(__CUDA_ARCH__) && \
    (__CUDA_ARCH__ < 800 || __CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
constexpr int kTileBlocks = 1;
#else
constexpr int kTileBlocks = 2;
#endif

template <int kRows>
struct TileShared {
    Piece x[2][kRows * kStepPieces];
    Piece codes[kStages][kTileStrips * kStepChunks * kWarp];
};

struct Token {
    int32_t zero_point, offset;
    float scale;
};

// Takes the place of TileShared when the products are made.
template <int kRows>
struct TileEnd {
    float sums[kFinishRows * kTilePitch];
    float scratch[kFinishFloats<kFinishRows, kTileColumns>];
    int32_t code_sums[kTileColumns];
    Token tokens[kRows];
};

template <int kRows>
constexpr size_t kTileBytes = sizeof(TileShared<kRows>) > sizeof(TileEnd<kRows>) ? sizeof(TileShared<kRows>)
                                                                                 : sizeof(TileEnd<kRows>);

// Whether outliers of axis 1 are multiplied as y's 16-bit floats. Codes less their zero point are exact in both; sm_75
// has no bfloat16.
PREQUANT_DEVICE bool multiplies_outliers(const Epilogue& epilogue) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
    if (epilogue.y.dtype == Dtype::bfloat16) return false;
#endif
    return epilogue.y.dtype != Dtype::float32 && epilogue.outliers.r > 0 && epilogue.outliers.axis == 1;
}

// values (warp's rows of W x its tokens) += outlier_weight x[:, dims]: raw floats, or codes less their zero point,
// which x_scale has yet to multiply.
template <typename T, int kRows, int kTokenTiles>
PREQUANT_DEVICE void multiply_outliers(const Epilogue& epilogue, TileEnd<kRows>& end, int64_t m0, int64_t n0,
                                       int first_token, int first_column,
                                       float (&values)[kWarpStrips][kTokenTiles][4]) {
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
            const int64_t n = n0 + e / kOutlierStep, j = first + e % kOutlierStep;
            weights[e / kOutlierStep * kPitch + e % kOutlierStep] =
                from_float<T>(n < epilogue.y.cols && j < outliers.r ? outliers.values[n * outliers.r + j] : 0);
        }
#pragma unroll 1
        for (int e = thread; e < kRows * kOutlierStep; e += kTileThreads) {
            const int64_t m = m0 + e / kOutlierStep, j = first + e % kOutlierStep;
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
                a[strip][i] =
                    load<uint32_t>(weights + (first_column + strip * kStripRows + lane / 4 + i % 2 * 8) * kPitch +
                                   i / 2 * 8 + lane % 4 * 2);
#pragma unroll
        for (int tile = 0; tile < kTokenTiles; ++tile) {
            uint32_t b[2];
#pragma unroll
            for (int i = 0; i < 2; ++i)
                b[i] = load<uint32_t>(tokens + (first_token + tile * kTileTokens + lane / 4) * kPitch + i * 8 +
                                      lane % 4 * 2);
#pragma unroll
            for (int strip = 0; strip < kWarpStrips; ++strip) mma_m16n8k16<T>(values[strip][tile], a[strip], b);
        }
    }
}

template <int kRows, bool kIsGrouped>
__global__ void __launch_bounds__(kTileThreads, kIsGrouped ? 1 : kTileBlocks)
    linear_w4a8_tiles_kernel(IntegerProduct product, Epilogue epilogue) {
    constexpr int kWarpRows = kRows / 2, kTokenTiles = kWarpRows / kTileTokens, kRowStep = kTileThreads / kStepPieces;
    constexpr int kParts = kRows / kRowStep, kChunkParts = kParts / kStepChunks, kPartTiles = kTokenTiles / kChunkParts;
    static_assert(kWarpStrips == 2);  // one strip's codes for each of two warps to add up
    static_assert(kRowStep % 8 == 0);  // rows so far apart have their pieces in the same order
    constexpr int kCopyStep = kTileThreads / (kStepChunks * kWarp), kCopies = kTileStrips / kCopyStep,
                  kShift = kHighShift<4>;
    auto& shared = *dynamic_shared<TileShared<kRows>>();
    const Activations& x = product.x;
    const Weight& weight = product.weight;
    const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp,
              my_strip = warp % kColumnWarps * kWarpStrips, half = warp / kColumnWarps;
    const int64_t M = x.M, N = weight.N, K = weight.K, G = weight.G;
    const int64_t m0 = int64_t(blockIdx.x) * kRows, n0 = int64_t(blockIdx.y) * kTileColumns;
    const CodeRange range = product.columns(blockIdx.z);
    const int64_t first_chunk = range.begin / kChunkColumns, last_chunk = ceil_div(range.end, kChunkColumns);
    const int steps = static_cast<int>(ceil_div(last_chunk - first_chunk, kStepChunks));

    // One address of each operand, that of the step to be loaded next; the others of this thread are a fixed number of
    // rows or strips further.
    const int copy_strip = thread / (kStepChunks * kWarp), copy_chunk = thread / kWarp % kStepChunks;
    // So many strips of this thread are left from its first one on.
    const int my_strips = static_cast<int>(smaller<int64_t>(ceil_div(N - n0, kStripRows), kTileStrips)) - copy_strip;
    const int my_chunk_steps = static_cast<int>(ceil_div(last_chunk - first_chunk - copy_chunk, kStepChunks));
    const uint8_t* my_codes =
        weight.packed + ((n0 / kStripRows + copy_strip) * product.chunks + first_chunk + copy_chunk) * chunk_bytes(4) +
        lane * lane_bytes(4);
    const auto copy_codes = [&](int step, int stage) {
#pragma unroll
        for (int i = 0; i < kCopies; ++i) {
            const bool is_there = i * kCopyStep < my_strips && step < my_chunk_steps;
            const uint8_t* const from = my_codes + i * kCopyStep * product.chunks * chunk_bytes(4);
            cp_async_16(&shared.codes[stage][thread + i * kTileThreads], is_there ? from : weight.packed,
                        is_there ? 16 : 0);
        }
        my_codes += kStepChunks * chunk_bytes(4);
    };
    // A step's x comes in parts of a piece a thread. Each is loaded before the products of a few tiles and stored after
    // them: one piece in registers.
    Piece piece;
    const int my_row = thread / kStepPieces, my_piece = thread % kStepPieces;
    const int my_rows = static_cast<int>(smaller<int64_t>(M - m0, kRows)) - my_row;
    const int my_piece_steps =
        static_cast<int>(ceil_div(ceil_div(K, kPieceCodes) - first_chunk * kChunkPieces - my_piece, kStepPieces));
    const uint8_t* my_x =
        product.codes + (m0 + my_row) * product.pitch + first_chunk * kChunkColumns + my_piece * kPieceCodes;
    const auto load_part = [&](int step, int part) {
        const bool is_there = part * kRowStep < my_rows && step < my_piece_steps;
        piece = is_there ? load<Piece>(my_x + part * kRowStep * product.pitch)
                         : Piece{{kMiddle, kMiddle, kMiddle, kMiddle}};
    };
    const auto store_part = [&](int buffer, int part) {
        store_signed(shared.x[buffer] + piece_place(my_row, my_piece, kStepPieces) + part * kRowStep * kStepPieces,
                     piece);
    };

    int32_t sums[kWarpStrips][kTokenTiles][4] = {};
    uint32_t code_sums[kIsGrouped ? kWarpStrips : 1][2] = {};  // of this lane's columns
    float floats[kIsGrouped ? kWarpStrips : 1][kIsGrouped ? kTokenTiles : 1][4] = {};
    const auto token_of = [&](int tile, int odd) { return half * kWarpRows + tile * kTileTokens + lane % 4 * 2 + odd; };
    const auto column_of = [&](int strip, int high) { return (my_strip + strip) * kStripRows + lane / 4 + 8 * high; };
    const auto fold = [&](int64_t g) {
        float scale[kWarpStrips][2] = {};
        int zero_point[kWarpStrips][2] = {}, code_sum[kWarpStrips][2];
#pragma unroll
        for (int strip = 0; strip < kWarpStrips; ++strip)
#pragma unroll
            for (int high = 0; high < 2; ++high) {
                const int64_t n = n0 + column_of(strip, high);
                if (n < N) {
                    const int64_t block = (weight.scale_rows == 1 ? 0 : n) * G + g;
                    scale[strip][high] = weight.scale[block], zero_point[strip][high] = weight.zero_point[block];
                }
                uint32_t sum = code_sums[strip][high];
                sum += __shfl_xor_sync(kAllLanes, sum, 1);
                sum += __shfl_xor_sync(kAllLanes, sum, 2);
                code_sum[strip][high] = static_cast<int>(sum >> (high * kShift));
                code_sums[strip][high] = 0;
            }
#pragma unroll
        for (int tile = 0; tile < kTokenTiles; ++tile)
#pragma unroll
            for (int odd = 0; odd < 2; ++odd) {
                const int64_t m = m0 + token_of(tile, odd);
                const int32_t offset = m < M ? token_offset(x, G, m, g, product.group_size) : 0;
                const int token_zero_point = m < M ? x.zero_point[x.per_token ? m : 0] : 0;
#pragma unroll
                for (int strip = 0; strip < kWarpStrips; ++strip)
#pragma unroll
                    for (int high = 0; high < 2; ++high) {
                        int32_t& sum = sums[strip][tile][2 * high + odd];
                        const int32_t part =
                            product_of(sum >> (high * kShift), token_zero_point, code_sum[strip][high]);
                        const auto value = static_cast<float>(add_zero_points(part, zero_point[strip][high], offset));
                        float& total = floats[strip][tile][2 * high + odd];
                        total = __fadd_rn(total, __fmul_rn(value, scale[strip][high]));
                        sum = 0;
                    }
            }
    };

#pragma unroll
    for (int step = 0; step < kStages - 1; ++step) {
        if (step < steps) copy_codes(step, step);
        cp_async_commit();
    }
    for (int part = 0; part < kParts && steps > 0; ++part) {
        load_part(0, part);
        store_part(0, part);
    }
    my_x += kStepColumns;
    int64_t group = 0, group_end = product.group_size / kChunkColumns;  // in chunks
    for (int step = 0, stage = 0; step < steps; ++step) {
        const Piece* const x_here = shared.x[step % 2];
        const Piece* const codes_here = shared.codes[stage];
        cp_async_wait<kStages - 2>();
        __syncthreads();  // this step's codes and x are there; all are done with the places that are filled next
        if (step + kStages - 1 < steps) copy_codes(step + kStages - 1, stage == 0 ? kStages - 1 : stage - 1);
        cp_async_commit();
#pragma unroll
        for (int chunk = 0; chunk < kStepChunks; ++chunk) {
            ChunkOperands operands[kWarpStrips];
#pragma unroll
            for (int strip = 0; strip < kWarpStrips; ++strip) {
                const Piece codes = load<Piece>(codes_here + ((my_strip + strip) * kStepChunks + chunk) * kWarp + lane);
                operands[strip] = unpack_chunk<4>({{codes.at[0], codes.at[1], codes.at[2], codes.at[3]}});
                if (kIsGrouped || strip == half) add_codes(operands[strip], code_sums[kIsGrouped ? strip : 0]);
            }
#pragma unroll
            for (int tile = 0; tile < kTokenTiles; ++tile) {
                const int part = chunk * kChunkParts + tile / kPartTiles;
                if (tile % kPartTiles == 0 && step + 1 < steps) load_part(step + 1, part);
                uint32_t tokens[4];
                const int place =
                    piece_place(half * kWarpRows + lane % 8, chunk * kChunkPieces + lane / 8, kStepPieces);
                ldmatrix_x4(tokens, x_here + place + tile * kTileTokens * kStepPieces);
#pragma unroll
                for (int strip = 0; strip < kWarpStrips; ++strip)
                    multiply_chunk(operands[strip], tokens, sums[strip][tile]);
                if (tile % kPartTiles == kPartTiles - 1 && step + 1 < steps) store_part((step + 1) % 2, part);
            }
            if constexpr (kIsGrouped) {
                if (first_chunk + step * kStepChunks + chunk + 1 == group_end) {
                    fold(group);
                    ++group, group_end += product.group_size / kChunkColumns;
                }
            }
        }
        my_x += kStepColumns;
        stage = stage == kStages - 1 ? 0 : stage + 1;
    }
    __syncthreads();

    auto& end = *dynamic_shared<TileEnd<kRows>>();
    for (int row = thread; row < kRows; row += kTileThreads) {
        const int64_t m = m0 + row < M ? m0 + row : M - 1, token = x.per_token ? m : 0;
        end.tokens[row] = {x.zero_point[token], kIsGrouped ? 0 : token_offset(x, 1, m, 0, K), x.scale[token]};
    }
    if constexpr (!kIsGrouped) {
#pragma unroll
        for (int high = 0; high < 2; ++high) {
            uint32_t sum = code_sums[0][high];
            sum += __shfl_xor_sync(kAllLanes, sum, 1);
            sum += __shfl_xor_sync(kAllLanes, sum, 2);
            if (lane % 4 == 0) end.code_sums[column_of(half, high)] = static_cast<int32_t>(sum >> (high * kShift));
        }
    }
    __syncthreads();

    const bool makes_pieces = !kIsGrouped && product.pieces != nullptr;
    // Outliers of axis 1 are multiplied by tensor cores, here; otherwise finish_tile does it.
    const bool has_columns = !makes_pieces && multiplies_outliers(epilogue);
    const bool has_raw_columns = has_columns && !epilogue.source.has_codes();
    int32_t code_sum[kWarpStrips][2] = {};
    float scale[kWarpStrips][2] = {};
    int zero_point[kWarpStrips][2] = {};
#pragma unroll
    for (int strip = 0; strip < kWarpStrips && !kIsGrouped; ++strip)
#pragma unroll
        for (int high = 0; high < 2; ++high) {
            const int column = column_of(strip, high);
            const int64_t n = n0 + column < N ? n0 + column : N - 1, block = weight.scale_rows == 1 ? 0 : n;
            code_sum[strip][high] = end.code_sums[column];
            if (!makes_pieces)
                scale[strip][high] = weight.scale[block], zero_point[strip][high] = weight.zero_point[block];
        }
    float values[kWarpStrips][kTokenTiles][4];
    // Tokens outside: six registers at a time, where all of them would take 48.
#pragma unroll
    for (int tile = 0; tile < kTokenTiles; ++tile)
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
            const Token token = end.tokens[token_of(tile, odd)];
#pragma unroll
            for (int i = 0; i < 2 * kWarpStrips; ++i) {
                const int strip = i / 2, high = i % 2;
                float& value = values[strip][tile][2 * high + odd];
                if constexpr (kIsGrouped) {
                    value = floats[strip][tile][2 * high + odd];
                } else {
                    const int32_t part = product_of(sums[strip][tile][2 * high + odd] >> (high * kShift),
                                                    token.zero_point, code_sum[strip][high]);
                    const auto sum = static_cast<float>(add_zero_points(part, zero_point[strip][high], token.offset));
                    value = makes_pieces ? __int_as_float(part) : __fmul_rn(sum, scale[strip][high]);
                }
                if (!makes_pieces && (!has_columns || has_raw_columns)) value = __fmul_rn(value, token.scale);
            }
        }
    if (has_columns) {
        if (epilogue.y.dtype == Dtype::float16)
            multiply_outliers<__half, kRows>(epilogue, end, m0, n0, half * kWarpRows, my_strip * kStripRows, values);
        else
            multiply_outliers<__nv_bfloat16, kRows>(epilogue, end, m0, n0, half * kWarpRows, my_strip * kStripRows,
                                                    values);
#pragma unroll
        for (int tile = 0; tile < kTokenTiles; ++tile)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float scale = has_raw_columns ? 1 : end.tokens[token_of(tile, i % 2)].scale;
#pragma unroll
                for (int strip = 0; strip < kWarpStrips; ++strip) values[strip][tile][i] *= scale;
            }
    }

    for (int first_row = 0; first_row < kRows; first_row += kFinishRows) {
        __syncthreads();  // the tile's place holds kFinishRows rows at a time
#pragma unroll
        for (int tile = 0; tile < kTokenTiles; ++tile)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int row = token_of(tile, i % 2) - first_row;
#pragma unroll
                for (int strip = 0; strip < kWarpStrips; ++strip)
                    if (row >= 0 && row < kFinishRows)
                        end.sums[row * kTilePitch + column_of(strip, i / 2)] = values[strip][tile][i];
            }
        __syncthreads();
        if (makes_pieces) {
            for (int e = thread; e < kFinishRows * kTileColumns / kQuad; e += kTileThreads) {
                const int row = e / (kTileColumns / kQuad), column = e % (kTileColumns / kQuad) * kQuad;
                if (m0 + first_row + row < M && n0 + column < N)
                    store_products(product, blockIdx.z, m0 + first_row + row, n0 + column,
                                   load<Vector<int32_t, kQuad>>(end.sums + row * kTilePitch + column));
            }
        } else {
            finish_tile<kTileThreads, kFinishRows, kTileColumns>(
                epilogue, m0 + first_row, n0, has_columns, end.scratch, [&](int row, int column) {
                    const auto sum = load<Vector<float, kQuad>>(end.sums + row * kTilePitch + column);
                    return QuadSums{{sum.at[0], sum.at[1], sum.at[2], sum.at[3]}};
                });
        }
    }
}

}  // namespace prequant::cuda
