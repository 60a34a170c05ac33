// The integer product of a few tokens, and of every shape that the tiles of integer_tiles.cuh cannot take.
//
//   block     kStrips strips of 16 rows of W x 8 kTokenTiles rows of x; kSlices warps share a strip, each takes 4
//             chunks of every stage
//
//   columns   |  stage 0                |  stage 1 ...     Weights go from memory to the registers of the one warp that
//   slice     | 0 0 0 0 | 1 1 1 1 | ... | 0 0 0 0 | ...    needs them, a stage ahead; x goes through shared memory, a
//                                                          stage ahead too.
//
// The last row of x is ones, so that its products are the sums of the weight's codes: the zero points of the
// activations need them. A range of columns that begins or ends inside a chunk counts its own columns alone, because
// elsewhere both x and the ones are 0.
#pragma once

#include "integer_epilogue.cuh"

namespace prequant::cuda {

constexpr int kBatch = 4;  // chunks of a warp in a stage: so many loads are under way

template <int kTokenTiles, int kStrips, int kSlices>
struct StripShapes {
    static constexpr int kRows = kTokenTiles * kTileTokens, kTokens = kRows - 1, kWarps = kStrips * kSlices,
                         kThreads = kWarps * kWarp;
    static constexpr int kChunks = kBatch * kSlices, kRowPieces = kChunks * kChunkPieces;
    // A thread moves one piece of every kRowStep-th row.
    static constexpr int kRowStep = kThreads / kRowPieces, kPieces = kRows / kRowStep;
    static_assert(kThreads % kRowPieces == 0 && kRows % kRowStep == 0);
    static constexpr int kColumns = kStrips * kStripRows, kPitch = kColumns + kQuad;
    static constexpr int kStageBytes = 2 * kRows * kRowPieces * kPieceCodes;
    static constexpr int kSumBytes = kSlices * kRows * kPitch * 4,
                         kEndBytes = kSumBytes + kFinishFloats<kTokens, kColumns> * 4;
    // At the end the sums take the place of x.
    static constexpr int kBytes = kStageBytes > kEndBytes ? kStageBytes : kEndBytes;
};

// kSlices = 1: float sums of groups, in the order of the groups. Otherwise exact sums of one range of columns, of which
// the slices are parts.
template <int kContainer, int kTokenTiles, int kStrips, int kSlices>
__global__ void __launch_bounds__(StripShapes<kTokenTiles, kStrips, kSlices>::kThreads, 1)
    linear_w4a8_strips_kernel(IntegerProduct product, Epilogue epilogue, unsigned token_blocks) {
    using S = StripShapes<kTokenTiles, kStrips, kSlices>;
    constexpr bool kIsGrouped = kSlices == 1;
    constexpr int kShift = kHighShift<kContainer>;
    PREQUANT_SHARED(memory, Vector<uint32_t, 4>[S::kBytes / 16]);
    const Activations& x = product.x;
    const Weight& weight = product.weight;
    const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp,
              strip = warp % kStrips, slice = warp / kStrips;
    const int64_t M = x.M, N = weight.N, K = weight.K, G = weight.G, size = product.group_size;
    const int64_t m0 = int64_t(blockIdx.x % token_blocks) * S::kTokens,
                  n0 = int64_t(blockIdx.x / token_blocks) * S::kColumns;
    const int64_t my_strip = n0 / kStripRows + strip;
    const bool is_active = my_strip * kStripRows < N;
    const uint8_t* const strip_chunks = weight.packed + my_strip * product.chunks * chunk_bytes(kContainer);
    const CodeRange all = product.columns(blockIdx.y);

    // A stage begins where the last one ended; groups that are no whole chunks each begin a stage of their own.
    const bool has_whole_chunks = !kIsGrouped || size % kChunkColumns == 0;
    const auto stage_from = [&](int64_t begin, int64_t group_end) -> CodeRange {
        int64_t end = (begin / kChunkColumns + S::kChunks) * kChunkColumns;
        if (!has_whole_chunks && end > group_end) end = group_end;
        return {begin, end < all.end ? end : all.end};
    };
    LaneCodes<kContainer> codes[kBatch];
    Piece pieces[S::kPieces];
    const auto load_chunk = [&](CodeRange stage, int i) {
        const int64_t chunk = stage.begin / kChunkColumns + slice * kBatch + i;
        if (is_active && chunk * kChunkColumns < stage.end)
            codes[i] = load_lane<kContainer>(strip_chunks + chunk * chunk_bytes(kContainer), lane);
        else
            codes[i] = {};
    };
    const auto load_pieces = [&](CodeRange stage) {
        const int64_t k = stage.begin / kChunkColumns * kChunkColumns + thread % S::kRowPieces * kPieceCodes;
#pragma unroll
        for (int i = 0; i < S::kPieces; ++i) {
            const int row = thread / S::kRowPieces + i * S::kRowStep;
            if (row == S::kTokens || m0 + row < M)
                pieces[i] = load_codes(product.codes + (m0 + row) * product.pitch, row == S::kTokens, k, stage,
                                       product.is_ragged);
            else
                pieces[i] = {{kMiddle, kMiddle, kMiddle, kMiddle}};
        }
    };
    const auto store_pieces = [&](int buffer) {
#pragma unroll
        for (int i = 0; i < S::kPieces; ++i) {
            const int row = thread / S::kRowPieces + i * S::kRowStep;
            store_signed(
                memory + buffer * S::kRows * S::kRowPieces + piece_place(row, thread % S::kRowPieces, S::kRowPieces),
                pieces[i]);
        }
    };

    int32_t sums[kTokenTiles][4] = {};
    float floats[kTokenTiles][4] = {};
    // The sums of group g, with zero points and scale, to floats; the sums begin again at 0.
    const auto fold = [&](int64_t g) {
        const int64_t n = my_strip * kStripRows + lane / 4;
        float scale[2] = {};
        int zero_point[2] = {}, code_sum[2];
#pragma unroll
        for (int high = 0; high < 2; ++high) {
            if (n + 8 * high < N) {
                const int64_t block = (weight.scale_rows == 1 ? 0 : n + 8 * high) * G + g;
                scale[high] = weight.scale[block], zero_point[high] = weight.zero_point[block];
            }
            code_sum[high] = __shfl_sync(kAllLanes, sums[kTokenTiles - 1][1 + 2 * high], lane | 3) >> (high * kShift);
        }
#pragma unroll
        for (int tile = 0; tile < kTokenTiles; ++tile)
#pragma unroll
            for (int odd = 0; odd < 2; ++odd) {
                const int64_t m = m0 + tile * kTileTokens + lane % 4 * 2 + odd;
                const bool is_token = m < M;
                const int32_t offset = is_token ? token_offset(x, G, m, g, size) : 0;
                const int token_zero_point = is_token ? x.zero_point[x.per_token ? m : 0] : 0;
#pragma unroll
                for (int high = 0; high < 2; ++high) {
                    const int32_t part =
                        product_of(sums[tile][2 * high + odd] >> (high * kShift), token_zero_point, code_sum[high]);
                    const auto value = static_cast<float>(add_zero_points(part, zero_point[high], offset));
                    floats[tile][2 * high + odd] =
                        __fadd_rn(floats[tile][2 * high + odd], __fmul_rn(value, scale[high]));
                }
            }
#pragma unroll
        for (int tile = 0; tile < kTokenTiles; ++tile)
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[tile][i] = 0;
    };

    int64_t group = 0, group_end = size;  // of kIsGrouped: the group that the sums belong to
    CodeRange stage = stage_from(all.begin, group_end);
    if (stage.begin < all.end) {
#pragma unroll
        for (int i = 0; i < kBatch; ++i) load_chunk(stage, i);
        load_pieces(stage);
        store_pieces(0);
    }
    for (int buffer = 0; stage.begin < all.end; buffer ^= 1) {
        __syncthreads();  // x of this stage is there, and the last stage's place is free
        const CodeRange next = stage_from(stage.end, stage.end == group_end ? group_end + size : group_end);
        if (next.begin < all.end) load_pieces(next);
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            const int piece = (slice * kBatch + i) * kChunkPieces + lane / 8;
            const ChunkOperands operands = unpack_chunk<kContainer>(codes[i]);
            if (next.begin < all.end) load_chunk(next, i);
#pragma unroll
            for (int tile = 0; tile < kTokenTiles; ++tile) {
                uint32_t tokens[4];
                ldmatrix_x4(tokens, memory + (buffer * S::kRows + tile * kTileTokens) * S::kRowPieces +
                                        piece_place(lane % 8, piece, S::kRowPieces));
                multiply_chunk(operands, tokens, sums[tile]);
            }
            if constexpr (kIsGrouped) {
                const int64_t chunk_begin = (stage.begin / kChunkColumns + i) * kChunkColumns;
                const int64_t chunk_end =
                    chunk_begin + kChunkColumns < stage.end ? chunk_begin + kChunkColumns : stage.end;
                if (chunk_begin < stage.end && chunk_end == group_end) {
                    fold(group);
                    ++group, group_end += size;
                }
            }
        }
        if (next.begin < all.end) store_pieces(buffer ^ 1);
        stage = next;
    }
    __syncthreads();

    // The slices' sums side by side, [slice][row of x][column of y]: 8 columns and 4 pairs of rows of a fragment meet
    // 32 different banks.
    auto* const shared_sums = reinterpret_cast<int32_t*>(memory);
#pragma unroll
    for (int tile = 0; tile < kTokenTiles; ++tile)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int row = tile * kTileTokens + lane % 4 * 2 + i % 2,
                      column = strip * kStripRows + lane / 4 + i / 2 * 8;
            const int32_t sum = kIsGrouped ? __float_as_int(floats[tile][i]) : sums[tile][i] >> (i / 2 * kShift);
            shared_sums[(slice * S::kRows + row) * S::kPitch + column] = sum;
        }
    __syncthreads();

    const auto sum_slices = [&](int row, int column) {
        Vector<int32_t, kQuad> sum{};
#pragma unroll
        for (int s = 0; s < kSlices; ++s) {
            const auto part = load<Vector<int32_t, kQuad>>(shared_sums + (s * S::kRows + row) * S::kPitch + column);
#pragma unroll
            for (int v = 0; v < kQuad; ++v) sum.at[v] += part.at[v];
        }
        return sum;
    };
    const auto token_products = [&](int row, int column) {
        Vector<int32_t, kQuad> products = sum_slices(row, column);
        const auto code_sums = sum_slices(S::kTokens, column);
        const int zero_point = x.zero_point[x.per_token ? m0 + row : 0];
#pragma unroll
        for (int v = 0; v < kQuad; ++v) products.at[v] = product_of(products.at[v], zero_point, code_sums.at[v]);
        return products;
    };
    if (!kIsGrouped && product.pieces != nullptr) {
        for (int e = thread; e < S::kTokens * S::kColumns / kQuad; e += S::kThreads) {
            const int row = e / (S::kColumns / kQuad), column = e % (S::kColumns / kQuad) * kQuad;
            if (m0 + row < M && n0 + column < N)
                store_products(product, blockIdx.y, m0 + row, n0 + column, token_products(row, column));
        }
        return;
    }
    float* const scratch = reinterpret_cast<float*>(shared_sums + S::kSumBytes / 4);
    finish_tile<S::kThreads, S::kTokens, S::kColumns>(epilogue, m0, n0, false, scratch, [&](int row, int column) {
        QuadSums quad;
        if constexpr (kIsGrouped) {
            const auto sum = sum_slices(row, column);
#pragma unroll
            for (int v = 0; v < kQuad; ++v) quad.at[v] = __int_as_float(sum.at[v]);
        } else {
            const auto products = token_products(row, column);
            const int32_t offset = token_offset(x, 1, m0 + row, 0, K);
#pragma unroll
            for (int v = 0; v < kQuad; ++v) {
                const int64_t n = n0 + column + v < N ? n0 + column + v : N - 1, block = weight.scale_rows == 1 ? 0 : n;
                quad.at[v] =
                    __fmul_rn(static_cast<float>(add_zero_points(products.at[v], weight.zero_point[block], offset)),
                              weight.scale[block]);
            }
        }
        const float scale = x.scale[x.per_token ? m0 + row : 0];
#pragma unroll
        for (int v = 0; v < kQuad; ++v) quad.at[v] = __fmul_rn(quad.at[v], scale);
        return quad;
    });
}

}  // namespace prequant::cuda
