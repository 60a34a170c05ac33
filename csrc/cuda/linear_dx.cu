// dx[m, k] = sum over n of dy[m, n] (code[n, k] - zero_point[n]) scale[n] + outliers       Meaning: reference.linear_dx
//
//   columns of a tile are columns k of the weight; a step is 64 rows n     (tile.cuh; x is dy)
//
//                 k      0 .. 63 | 64 .. 127 | 128 .. 191 | 192 .. 255     The forward's chunks, read the other way:
//     n  0 .. 15       [ chunk   |  chunk    |  chunk     |  chunk     ]   movmatrix transposes a word's four 8 x 8
//       ...               warp 0    warp 1      warp 2       warp 3        matrices of codes at once, and its registers
//       48 .. 63       [ chunk   |  chunk    |  chunk     |  chunk     ]   are B operands of
//                                                               dx tile (16 m x 8 k) += dy (16 m x 16 n) W (16 n x 8 k)
//
// Requires   prepacked weights; one scale a chunk and row: groups are multiples of 64. dy of any shape, as x in
//            linear_w4a16.
// Sums in    float32, in mma order. A tensor's scale multiplies the sum; scales of rows and groups lie on the reduction
//            and multiply the weight in T, as in a dense weight of that type: folded into dy they would underflow.
//            Rounded to T at the end. Parts as in linear_w4a16.
// Limited by reading the codes, once for each tile of rows (M <= 64); above, by the tensor cores.
#include "cuda.h"
#include "dispatch.h"
#include "tile.cuh"

namespace prequant::cuda {

namespace {

using SlimTile = Tile<16, 256, 64, 4>;
using WideTile = Tile<64, 256, 64, 4>;

// Zero point and scale of each row and chunk column of a step, in shared memory behind the ring: the scale's T in the
// upper half of a word. A thread loads its entries of the next step before a step's products and stores them after.
template <typename TileT, typename T>
struct RowScales {
    static constexpr int kColumns = TileT::kColumns / static_cast<int>(kChunkColumns),
                         kEntries = kColumns * TileT::kDepth;
    // Two steps have entries: the one in use and the next.
    static constexpr int kEach = kEntries / TileT::kThreads, kBytes = 2 * kEntries * 4;
    static_assert(kEntries % TileT::kThreads == 0 && TileT::kThreads % TileT::kDepth == 0);
    uint32_t* shared;
    int64_t block[kEach];  // of the thread's entries
    int64_t rows_apart;  // blocks from a step to the next
    int rows;  // of N from the thread's on
    uint32_t entries[kEach];

    __device__ __forceinline__ RowScales(uint32_t* shared_, const Product& p, int64_t n0, int64_t across)
        : shared(shared_) {
        const Weight& w = p.weight;
        const int thread = static_cast<int>(threadIdx.x), row = thread % TileT::kDepth;
        const int64_t each_row = w.scale_rows == 1 ? 0 : w.G;
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
            const int column = as_int(across) + (thread + i * TileT::kThreads) / TileT::kDepth,
                      group = p.group_chunks == 0 ? 0 : column / p.group_chunks;
            block[i] = (n0 + row) * each_row + (group < w.G ? group : 0);  // columns past the end are not stored
        }
        rows_apart = TileT::kDepth * each_row, rows = as_int(w.N - n0 - row);
    }
    __device__ __forceinline__ void load_next(const Weight& w) {
        const bool is_per_tensor = w.scale_rows == 1 && w.G == 1;
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
            entries[i] = 0;
            if (rows > 0) {
                const T scale = from_float<T>(is_per_tensor ? 1.0f : w.scale[block[i]]);
                entries[i] = uint32_t{bits_as<uint16_t>(scale)} << 16 | w.zero_point[block[i]];
            }
            block[i] += rows_apart;
        }
        rows -= TileT::kDepth;
    }
    __device__ __forceinline__ void keep(int step) {
#pragma unroll
        for (int i = 0; i < kEach; ++i)
            shared[step % 2 * kEntries + static_cast<int>(threadIdx.x) + i * TileT::kThreads] = entries[i];
    }
};

// kIsPerRow: zero points and scales differ from row to row; otherwise the tensor's one scale is applied at the end.
template <typename T, int kContainer, typename TileT, bool kIsPerRow>
__global__ void __launch_bounds__(TileT::kThreads, TileT::kRows == 16 ? 4 : 2) linear_dx_kernel(Product p, int slots) {
    using Scales = RowScales<TileT, T>;
    constexpr int kDeep = TileT::kDepth / 16;  // chunks of a warp, a step
    const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
    const int64_t k0 = int64_t(blockIdx.x) * TileT::kColumns, m0 = int64_t(blockIdx.y) * TileT::kRows,
                  part = blockIdx.z;
    const int64_t first = part * p.steps;
    const int steps =
        as_int(ceil_div(p.depth, TileT::kDepth) - first < p.steps ? ceil_div(p.depth, TileT::kDepth) - first : p.steps);
    const Weight& w = p.weight;

    ZeroPoints zero = zero_points<T, kContainer>(w.zero_point[0] * 0x10001u, w.zero_point[0] * 0x10001u);
    Scales scales(reinterpret_cast<uint32_t*>(dynamic_shared<uint8_t>() + slots * TileT::slot_bytes(kContainer)), p,
                  first * TileT::kDepth, k0 / kChunkColumns);
    if constexpr (kIsPerRow) {
        scales.load_next(w);
        scales.keep(0);
    }

    Sums<TileT> sums{};
    CopyX<TileT> copy_x(p, m0, first * TileT::kDepth);
    CopyChunks<TileT, kContainer, kDeep, TileT::kWarps, true> copy_chunks(w, first * kDeep, k0 / kChunkColumns);
    march(
        steps, slots, TileT::slot_bytes(kContainer),
        [&](uint8_t* slot) {
            copy_x(slot);
            copy_chunks(slot);
        },
        [&](int step, const uint8_t* slot) {
            if constexpr (kIsPerRow) scales.load_next(w);
#pragma unroll
            for (int c = 0; c < kDeep; ++c) {
                const auto codes = load_codes<kContainer>(
                    slot + TileT::kXBytes + (c * TileT::kWarps + warp) * chunk_bytes(kContainer), lane);
                uint32_t a[TileT::kRowTiles][4];
                load_x<TileT>(a, slot, c);
                uint32_t scale[2];  // of rows 2t, 2t + 1 and of those 8 on
                if constexpr (kIsPerRow) {
                    const uint32_t* row =
                        scales.shared + step % 2 * Scales::kEntries + warp * TileT::kDepth + c * 16 + lane % 4 * 2;
                    const auto low = load<Vector<uint32_t, 2>>(row), high = load<Vector<uint32_t, 2>>(row + 8);
                    zero = zero_points<T, kContainer>(prmt(low.at[0], low.at[1], 0x5410),
                                                      prmt(high.at[0], high.at[1], 0x5410));
                    scale[0] = prmt(low.at[0], low.at[1], 0x7632), scale[1] = prmt(high.at[0], high.at[1], 0x7632);
                }
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    Registers weight =
                        registers_of<T, kContainer>(transposed<kContainer>(tile_codes<kContainer>(codes, j)), zero);
                    if constexpr (kIsPerRow)
#pragma unroll
                        for (int r = 0; r < 4; ++r) weight.at[r] = multiply_pairs<T>(weight.at[r], scale[r % 2]);
#pragma unroll
                    for (int kk = 0; kk < 2; ++kk)
#pragma unroll
                        for (int i = 0; i < TileT::kRowTiles; ++i)
                            mma_m16n8k16<T>(sums.at[i][j * 2 + kk], a[i], {weight.at[kk * 2], weight.at[kk * 2 + 1]});
                }
            }
            if constexpr (kIsPerRow) scales.keep(step + 1);
        });
    const float scale = w.scale_rows == 1 && w.G == 1 ? w.scale[0] : 1.0f;
    for_each_sum<TileT>([&](int i, int q, int r, int, int) { sums.at[i][q][r] *= scale; });
    write_tile<TileT, T>(sums, p, m0, k0, part);
}

template <typename T, int kContainer, typename TileT, bool kIsPerRow>
void launch_tiles(Product p, const Gpu& gpu, MutableMatrix grad_x, Stream stream) {
    constexpr int kBlocksOfSm = TileT::kRows == 16 ? 4 : 2;
    const int64_t row_tiles = ceil_div(p.M, TileT::kRows), column_tiles = ceil_div(p.columns, TileT::kColumns);
    const Split split = split_reduction(row_tiles * column_tiles, ceil_div(p.depth, TileT::kDepth),
                                        int64_t(gpu.multiprocessors) * kBlocksOfSm);
    const int slots = ring_slots(gpu.sm),
              ring_bytes = slots * TileT::slot_bytes(kContainer) + (kIsPerRow ? RowScales<TileT, T>::kBytes : 0);
    p.steps = split.steps;
    p.partial = split.parts == 1 ? nullptr : static_cast<float*>(stream.scratch(split.parts * p.M * p.columns * 4));
    launch("linear_dx_kernel", linear_dx_kernel<T, kContainer, TileT, kIsPerRow>,
           {.grid = dim3(static_cast<unsigned>(column_tiles), static_cast<unsigned>(row_tiles),
                         static_cast<unsigned>(split.parts)),
            .block = dim3(TileT::kThreads),
            .stream = stream,
            .shared_bytes = static_cast<size_t>(std::max(ring_bytes, TileT::shared_bytes(kContainer, slots)))},
           p, slots);
    if (p.partial != nullptr)
        finish(p.partial, split.parts, {}, {nullptr, nullptr, 0, 1}, nullptr, nullptr, grad_x, stream);
}

template <typename T>
void linear(const Product& p, MutableMatrix grad_x, Stream stream) {
    const Gpu gpu = current_gpu();
    const Weight& w = p.weight;
    const Regime regime = regime_of(p.M, w.N * w.K, gpu.sm);
    const bool is_slim = regime == Regime::vector || regime == Regime::slim, is_per_row = w.scale_rows > 1 || w.G > 1;
    // 2 and 8 bits take the kernel of rows for a tensor's scale too: its rows are alike.
    const auto run =
        w.container == 2   ? (is_slim ? launch_tiles<T, 2, SlimTile, true> : launch_tiles<T, 2, WideTile, true>)
        : w.container == 8 ? (is_slim ? launch_tiles<T, 8, SlimTile, true> : launch_tiles<T, 8, WideTile, true>)
        : is_per_row       ? (is_slim ? launch_tiles<T, 4, SlimTile, true> : launch_tiles<T, 4, WideTile, true>)
                           : (is_slim ? launch_tiles<T, 4, SlimTile, false> : launch_tiles<T, 4, WideTile, false>);
    run(p, gpu, grad_x, stream);
}

__global__ void transpose_kernel(const float* __restrict__ values, int64_t rows, int64_t columns,
                                 float* __restrict__ transposed) {
    const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < rows * columns) transposed[i % columns * rows + i / columns] = values[i];
}

}  // namespace

void linear_dx(Matrix grad_y, Weight weight, Outliers outliers, bool, MutableMatrix grad_x, Stream stream) {
    if (grad_y.rows == 0 || weight.K == 0) return;
    Product p = product_of(grad_y, weight, grad_x, stream);
    p.dims = outliers.dims;
    if (outliers.axis == 0) {
        p.values = outliers.values, p.gathered = outliers.r, p.along_column = 1, p.along_outlier = weight.K;
    } else if (outliers.r > 0) {
        // The columns idx of dx get dy O: the outlier rows of a forward whose values are O^T.
        constexpr unsigned kThreads = 256;
        float* values = static_cast<float*>(stream.scratch(weight.N * outliers.r * 4));
        float* side = static_cast<float*>(stream.scratch(grad_y.rows * outliers.r * 4));
        if (weight.N > 0)
            launch("transpose_kernel", transpose_kernel,
                   {.grid = grid_of("linear_dx", ceil_div(weight.N * outliers.r, kThreads)),
                    .block = dim3(kThreads),
                    .stream = stream},
                   outliers.values, weight.N, outliers.r, values);
        outlier_side({.floats = grad_y}, {outliers.dims, values, outliers.r, 0}, side, stream);
        p.side = side, p.side_columns = outliers.r;
    }
    grad_y.dtype == Dtype::float16 ? linear<__half>(p, grad_x, stream) : linear<__nv_bfloat16>(p, grad_x, stream);
}

}  // namespace prequant::cuda
