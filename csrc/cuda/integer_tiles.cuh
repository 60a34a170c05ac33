// The integer product of many tokens: 128 (or 64) rows of x times 128 rows of W, in steps of 128 columns.
//
//   W    8 strips x 2 chunks a step, cp.async, 3 stages         warps      n 0..31 | 32..63 | 64..95 | 96..127
//   x    128 rows x 8 pieces of 16 codes a step, through        m 0..63       0    |   1    |   2    |   3
//        registers a step ahead, 2 buffers                      m 64..127     4    |   5    |   6    |   7
//
//   A warp multiplies 2 strips by 8 (or 4) tiles of 8 tokens. Two warps share them: each adds up the codes of one, half
//   an extra dp4a a word and row. (A row of ones in x, as strips have it, would cost an eighth more products here.)
//   What becomes of the sums is in integer_tile_sums.cuh.
//
// Requires   4-bit containers; groups, and the ranges of pieces, are whole chunks.
#pragma once

#include "integer_tile_sums.cuh"

namespace prequant::cuda {

constexpr int kStepChunks = 2, kStepPieces = kStepChunks * kChunkPieces, kStages = 3;
constexpr int64_t kStepColumns = kStepChunks * kChunkColumns;

// Blocks of ungrouped tiles on a multiprocessor: registers are kept to 128 for two where its shared memory has room for
// two, 160 KiB or more.
#if defined(__CUDA_ARCH__) && \
    (__CUDA_ARCH__ < 800 || __CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
constexpr int kTileBlocks = 1;
#else
constexpr int kTileBlocks = 2;
#endif

template <int kRows>
using XBuffers = Piece[2][kRows * kStepPieces];
using CodeStages = Piece[kStages][kTileStrips * kStepChunks * kWarp];

template <int kRows>
struct TileShared {
    XBuffers<kRows> x;
    CodeStages codes;
};

// TileEnd takes the place of TileShared when the products are made.
template <int kRows>
constexpr size_t kTileBytes = sizeof(TileShared<kRows>) > sizeof(TileEnd<kRows>) ? sizeof(TileShared<kRows>)
                                                                                 : sizeof(TileEnd<kRows>);

// ---- load ----

// The chunks along K that a block multiplies.
struct ChunkRange {
    int64_t first, count;

    PREQUANT_DEVICE ChunkRange(CodeRange columns) {
        first = columns.begin / kChunkColumns, count = ceil_div(columns.end, kChunkColumns) - first;
    }
    PREQUANT_DEVICE int steps_from(int64_t chunk) const {
        return static_cast<int>(ceil_div(count - chunk, kStepChunks));
    }
};

// Copies W's codes of step after step to a stage, a lane's 16 bytes of a chunk a thread. The thread keeps one address,
// that of the step to be copied next; its other strips are a fixed number of bytes further.
struct CopyCodes {
    static constexpr int kStripsAtOnce = kTileThreads / (kStepChunks * kWarp), kTimes = kTileStrips / kStripsAtOnce;
    const IntegerProduct& product;
    CodeStages& stages;
    const uint8_t* from;
    int strips, steps;  // of the matrix, from the thread's first strip and chunk on

    PREQUANT_DEVICE CopyCodes(const IntegerProduct& product_, CodeStages& stages_, int64_t n0, const ChunkRange& chunks)
        : product(product_), stages(stages_) {
        const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp;
        const int strip = thread / (kStepChunks * kWarp), chunk = thread / kWarp % kStepChunks;
        strips = static_cast<int>(min(ceil_div(product.weight.N - n0, kStripRows), int64_t{kTileStrips})) - strip;
        steps = chunks.steps_from(chunk);
        from = product.weight.packed +
               ((n0 / kStripRows + strip) * product.chunks + chunks.first + chunk) * chunk_bytes(4) +
               lane * lane_bytes(4);
    }
    PREQUANT_DEVICE void operator()(int step, int stage) {
#pragma unroll
        for (int i = 0; i < kTimes; ++i) {
            const bool is_there = i * kStripsAtOnce < strips && step < steps;
            const uint8_t* const codes = from + i * kStripsAtOnce * product.chunks * chunk_bytes(4);
            cp_async_16(&stages[stage][static_cast<int>(threadIdx.x) + i * kTileThreads],
                        is_there ? codes : product.weight.packed, is_there ? 16 : 0);
        }
        from += kStepChunks * chunk_bytes(4);
    }
};

// Brings x of step after step to a buffer, in kParts parts of a piece a thread. Each is loaded before the products of a
// few tiles and stored after them: one piece in registers. The address is kept as in CopyCodes.
template <int kRows>
struct LoadX {
    static constexpr int kRowStep = kTileThreads / kStepPieces, kParts = kRows / kRowStep;
    static_assert(kRowStep % 8 == 0);  // rows so far apart have their pieces in the same order
    const IntegerProduct& product;
    XBuffers<kRows>& buffers;
    const uint8_t* from;
    int row, column, rows, steps;  // the thread's first row and its piece of it; of the matrix, from these on
    Piece piece;

    PREQUANT_DEVICE LoadX(const IntegerProduct& product_, XBuffers<kRows>& buffers_, int64_t m0,
                          const ChunkRange& chunks)
        : product(product_), buffers(buffers_) {
        row = static_cast<int>(threadIdx.x) / kStepPieces, column = static_cast<int>(threadIdx.x) % kStepPieces;
        rows = static_cast<int>(min(product.x.M - m0, int64_t{kRows})) - row;
        steps = static_cast<int>(
            ceil_div(ceil_div(product.weight.K, kPieceCodes) - chunks.first * kChunkPieces - column, kStepPieces));
        from = product.codes + (m0 + row) * product.pitch + chunks.first * kChunkColumns + column * kPieceCodes;
    }
    PREQUANT_DEVICE void load_part(int step, int part) {
        const bool is_there = part * kRowStep < rows && step < steps;
        piece = is_there ? load<Piece>(from + part * kRowStep * product.pitch)
                         : Piece{{kMiddle, kMiddle, kMiddle, kMiddle}};
    }
    PREQUANT_DEVICE void store_part(int step, int part) const {
        store_signed(buffers[step % 2] + piece_place(row, column, kStepPieces) + part * kRowStep * kStepPieces, piece);
    }
    PREQUANT_DEVICE void next_step() { from += kStepColumns; }
};

// ---- multiply ----

// One chunk of a step of the warp's strips, unpacked. Adds up their codes: with groups of both strips, else of the one
// that this warp and not its neighbour has to add up.
template <int kRows, bool kIsGrouped>
PREQUANT_DEVICE void unpack_strips(const Piece* stage, int chunk, const TilePart<kRows>& part,
                                   TileSums<kRows, kIsGrouped>& sums, ChunkOperands (&operands)[kWarpStrips]) {
#pragma unroll
    for (int strip = 0; strip < kWarpStrips; ++strip) {
        const Piece codes = load<Piece>(stage + ((part.first_strip + strip) * kStepChunks + chunk) * kWarp + part.lane);
        operands[strip] = unpack_chunk<4>({{codes.at[0], codes.at[1], codes.at[2], codes.at[3]}});
        if (kIsGrouped || strip == part.half) add_codes(operands[strip], sums.code_sums[kIsGrouped ? strip : 0]);
    }
}

// sums += that chunk of the strips times a tile of 8 tokens.
template <int kRows, bool kIsGrouped>
PREQUANT_DEVICE void multiply_tile(const ChunkOperands (&operands)[kWarpStrips], const Piece* x, int chunk, int tile,
                                   const TilePart<kRows>& part, TileSums<kRows, kIsGrouped>& sums) {
    uint32_t tokens[4];
    const int place =
        piece_place(part.half * part.kWarpRows + part.lane % 8, chunk * kChunkPieces + part.lane / 8, kStepPieces);
    ldmatrix_x4(tokens, x + place + tile * kTileTokens * kStepPieces);
#pragma unroll
    for (int strip = 0; strip < kWarpStrips; ++strip) multiply_chunk(operands[strip], tokens, sums.sums[strip][tile]);
}

template <int kRows, bool kIsGrouped>
__global__ void __launch_bounds__(kTileThreads, kIsGrouped ? 1 : kTileBlocks)
    linear_w4a8_tiles_kernel(IntegerProduct product, Epilogue epilogue) {
    using X = LoadX<kRows>;
    // kPartTiles: a part of x is brought during the products of so many tiles.
    constexpr int kTokenTiles = TilePart<kRows>::kTokenTiles, kChunkParts = X::kParts / kStepChunks,
                  kPartTiles = kTokenTiles / kChunkParts;
    auto& shared = *dynamic_shared<TileShared<kRows>>();
    const TilePart<kRows> part(product);
    const ChunkRange chunks(product.columns(blockIdx.z));
    const int steps = chunks.steps_from(0);
    CopyCodes copy_codes(product, shared.codes, part.n0, chunks);
    X x(product, shared.x, part.m0, chunks);
    TileSums<kRows, kIsGrouped> sums;

#pragma unroll
    for (int step = 0; step < kStages - 1; ++step) {
        if (step < steps) copy_codes(step, step);
        cp_async_commit();
    }
    for (int i = 0; i < X::kParts && steps > 0; ++i) {
        x.load_part(0, i);
        x.store_part(0, i);
    }
    x.next_step();

    int64_t group = 0, group_end = product.group_size / kChunkColumns;  // in chunks
    for (int step = 0, stage = 0; step < steps; ++step) {
        const Piece *const codes_here = shared.codes[stage], *const x_here = shared.x[step % 2];
        cp_async_wait<kStages - 2>();
        __syncthreads();  // this step's codes and x are there; all are done with the places that are filled next
        if (step + kStages - 1 < steps) copy_codes(step + kStages - 1, stage == 0 ? kStages - 1 : stage - 1);
        cp_async_commit();
#pragma unroll
        for (int chunk = 0; chunk < kStepChunks; ++chunk) {
            ChunkOperands operands[kWarpStrips];
            unpack_strips(codes_here, chunk, part, sums, operands);
#pragma unroll
            for (int tile = 0; tile < kTokenTiles; ++tile) {
                const int i = chunk * kChunkParts + tile / kPartTiles;
                if (tile % kPartTiles == 0 && step + 1 < steps) x.load_part(step + 1, i);
                multiply_tile(operands, x_here, chunk, tile, part, sums);
                if (tile % kPartTiles == kPartTiles - 1 && step + 1 < steps) x.store_part(step + 1, i);
            }
            if constexpr (kIsGrouped) {
                if (chunks.first + step * kStepChunks + chunk + 1 == group_end) {
                    fold_group(product, part, group, sums);
                    ++group, group_end += product.group_size / kChunkColumns;
                }
            }
        }
        x.next_step();
        stage = stage == kStages - 1 ? 0 : stage + 1;
    }
    __syncthreads();
    finish_sums(product, epilogue, part, sums);
}

}  // namespace prequant::cuda
