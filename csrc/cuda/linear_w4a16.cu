// y[m, n] = scale[n] sum over k of x[m, k] (code[n, k] - zero_point[n]) + outliers + bias[n]
//                                                                                       Meaning: reference.linear_w4a16
//   columns of a tile are rows n of the weight; a step is 64 or 128 columns k    (tile.cuh; at most 8 tokens: gemv.cuh)
//
//                 k      0 .. 63 | 64 .. 127          a chunk, 16 rows n x 64 columns k, is four 16 x 16 words a lane;
//     n  0 .. 15       [ chunk   |  chunk   ]  warp 0     a word is two n8-tiles of the B operand, x is A:
//       16 .. 31       [ chunk   |  chunk   ]  warp 1         y tile (16 m x 8 n) += x (16 m x 16 k) W^T (16 k x 8 n)
//          ...
//
// Requires   prepacked weights; one scale a chunk: groups are multiples of 64, but for at most 3 tokens (simt.cuh). x
//            of any shape: where its rows do not lie on 16 bytes, a copy does.
// Sums in    float32, in mma order. A scale multiplies its sum in float32: a tensor's or a row's at the end, a group's
//            where the group ends. Outliers of axis 1 are steps of mma into the scaled sum; the rounding to T is last.
//            A cut reduction adds its parts in order.
// Limited by reading the codes, once for each tile of rows (M <= 64); above, by the tensor cores.
#include "cuda.h"
#include "dispatch.h"
#include "gemv.cuh"
#include "simt.cuh"
#include "tile.cuh"

namespace prequant::cuda {

namespace {

using SlimTile = Tile<16, 128, 128, 8>;
using WideTile = Tile<64, 256, 64, 8>;

template <typename T, int kContainer, typename TileT>
__global__ void __launch_bounds__(TileT::kThreads, TileT::kRows == 16 ? 2 : 1)
    linear_w4a16_kernel(Product p, int slots) {
    // kDeep: chunks of a warp, a step.
    constexpr int kBlocks = TileT::kWarpColumns / 16, kDeep = TileT::kDepth / static_cast<int>(kChunkColumns);
    const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
    const int64_t n0 = int64_t(blockIdx.x) * TileT::kColumns, m0 = int64_t(blockIdx.y) * TileT::kRows,
                  part = blockIdx.z;
    const int64_t first = part * p.steps;
    const int steps =
        as_int(ceil_div(p.depth, TileT::kDepth) - first < p.steps ? ceil_div(p.depth, TileT::kDepth) - first : p.steps);
    const Weight& w = p.weight;

    // The scale's group that the march is in; one group has no end.
    const int first_chunk = as_int(first * kDeep);
    int group = p.group_chunks == 0 ? 0 : first_chunk / p.group_chunks;
    int chunks_left = p.group_chunks == 0 ? -1 : p.group_chunks - first_chunk % p.group_chunks;
    const int64_t warp_row = n0 + warp * TileT::kWarpColumns;
    const auto block_of = [&](int64_t n, int of_group) {
        return (w.scale_rows == 1 ? 0 : n < w.N ? n : w.N - 1) * w.G + (of_group < w.G ? of_group : w.G - 1);
    };

    ZeroPoints zero[kBlocks];
    uint32_t next_zero[kBlocks][2];  // of the next group, loaded a group ahead
    const auto load_zero = [&](int of_group) {
#pragma unroll
        for (int b = 0; b < kBlocks; ++b)
#pragma unroll
            for (int nn = 0; nn < 2; ++nn)
                next_zero[b][nn] = w.zero_point[block_of(warp_row + b * 16 + nn * 8 + lane / 4, of_group)];
    };
    const auto enter_group = [&] {
#pragma unroll
        for (int b = 0; b < kBlocks; ++b)
            zero[b] = zero_points<T, kContainer>(next_zero[b][0] * 0x10001u, next_zero[b][1] * 0x10001u);
        load_zero(group + 1);
    };
    Sums<TileT> sums{}, totals{};
    const auto leave_group = [&] {
#pragma unroll
        for (int q = 0; q < TileT::kColumnTiles; ++q)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const float scale = w.scale[block_of(warp_row + q * 8 + lane % 4 * 2 + e, group)];
#pragma unroll
                for (int i = 0; i < TileT::kRowTiles; ++i)
#pragma unroll
                    for (int r = e; r < 4; r += 2) {
                        totals.at[i][q][r] = __fmaf_rn(sums.at[i][q][r], scale, totals.at[i][q][r]);
                        sums.at[i][q][r] = 0;
                    }
            }
        ++group, chunks_left = p.group_chunks;
    };

    load_zero(group);
    enter_group();
    CopyX<TileT> copy_x(p, m0, first * TileT::kDepth);
    CopyChunks<TileT, kContainer, TileT::kColumns / 16, kDeep, false> copy_chunks(w, n0 / kChunkRows, first * kDeep);
    march(
        steps, slots, TileT::slot_bytes(kContainer),
        [&](uint8_t* slot) {
            copy_x(slot);
            copy_chunks(slot);
        },
        [&](int, const uint8_t* slot) {
#pragma unroll
            for (int c = 0; c < kDeep; ++c) {
                LaneCodes<kContainer> codes[kBlocks];
#pragma unroll
                for (int b = 0; b < kBlocks; ++b)
                    codes[b] = load_codes<kContainer>(
                        slot + TileT::kXBytes + ((warp * kBlocks + b) * kDeep + c) * chunk_bytes(kContainer), lane);
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    uint32_t a[TileT::kRowTiles][4];
                    load_x<TileT>(a, slot, c * 4 + j);
#pragma unroll
                    for (int b = 0; b < kBlocks; ++b) {
                        const Registers weight =
                            registers_of<T, kContainer>(tile_codes<kContainer>(codes[b], j), zero[b]);
#pragma unroll
                        for (int nn = 0; nn < 2; ++nn)
#pragma unroll
                            for (int i = 0; i < TileT::kRowTiles; ++i)
                                mma_m16n8k16<T>(sums.at[i][b * 2 + nn], a[i], {weight.at[nn], weight.at[nn + 2]});
                    }
                }
                if (--chunks_left == 0) leave_group(), enter_group();
            }
        });
    leave_group();
    write_tile<TileT, T>(totals, p, m0, n0, part);
}

template <typename T, int kContainer, typename TileT>
void launch_tiles(Product p, const Gpu& gpu, MutableMatrix y, Stream stream) {
    constexpr int kBlocksOfSm = TileT::kRows == 16 ? 2 : 1;
    const int64_t row_tiles = ceil_div(p.M, TileT::kRows), column_tiles = ceil_div(p.columns, TileT::kColumns);
    const Split split = split_reduction(row_tiles * column_tiles, ceil_div(p.depth, TileT::kDepth),
                                        int64_t(gpu.multiprocessors) * kBlocksOfSm);
    const int slots = ring_slots(gpu.sm);
    p.steps = split.steps;
    p.partial = split.parts == 1 ? nullptr : static_cast<float*>(stream.scratch(split.parts * p.M * p.columns * 4));
    launch("linear_w4a16_kernel", linear_w4a16_kernel<T, kContainer, TileT>,
           {.grid = dim3(static_cast<unsigned>(column_tiles), static_cast<unsigned>(row_tiles),
                         static_cast<unsigned>(split.parts)),
            .block = dim3(TileT::kThreads),
            .stream = stream,
            .shared_bytes = static_cast<size_t>(TileT::shared_bytes(kContainer, slots))},
           p, slots);
    if (p.partial != nullptr) finish(p.partial, split.parts, {}, {nullptr, nullptr, 0, 1}, nullptr, nullptr, y, stream);
}

template <typename T>
void linear(const Product& p, const Gpu& gpu, MutableMatrix y, Stream stream) {
    const int container = p.weight.container;
    Regime regime = regime_of(p.M, p.weight.N * p.weight.K, gpu.sm);
    if (regime == Regime::vector && container == 4) return launch_gemv<T>(p, gpu, stream);
    const bool is_slim = regime == Regime::vector || regime == Regime::slim;
    const auto run = container == 2   ? (is_slim ? launch_tiles<T, 2, SlimTile> : launch_tiles<T, 2, WideTile>)
                     : container == 4 ? (is_slim ? launch_tiles<T, 4, SlimTile> : launch_tiles<T, 4, WideTile>)
                                      : (is_slim ? launch_tiles<T, 8, SlimTile> : launch_tiles<T, 8, WideTile>);
    run(p, gpu, y, stream);
}

}  // namespace

void linear_w4a16(Matrix x, Weight weight, Outliers outliers, const float* bias, bool, MutableMatrix y, Stream stream) {
    if (x.rows == 0 || weight.N == 0) return;
    float* side = nullptr;  // what outliers of axis 0 add
    if (outliers.axis == 0 && outliers.r > 0) {
        side = static_cast<float*>(stream.scratch(x.rows * outliers.r * 4));
        outlier_side({.floats = x}, outliers, side, stream);
    }
    const Gpu gpu = current_gpu();
    if (forward_regime(x.rows, weight, x.dtype, gpu.sm) == Regime::simt)
        return linear_simt(x, weight, outliers, side, bias, y, gpu, stream);

    Product p = product_of(x, weight, y, stream);
    p.bias = bias;
    p.dims = outliers.dims;
    if (outliers.axis == 1)
        p.values = outliers.values, p.gathered = outliers.r, p.along_column = outliers.r, p.along_outlier = 1;
    else
        p.side = side, p.side_columns = outliers.r;
    x.dtype == Dtype::float16 ? linear<__half>(p, gpu, y, stream) : linear<__nv_bfloat16>(p, gpu, y, stream);
}

}  // namespace prequant::cuda
