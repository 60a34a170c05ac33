// y = x̂ W^T + outliers + bias on 8-bit activations:
//     (sum over g of float(S(qa - za)(qw - zw)) scale[n, g]) x_scale[m], then float terms.
//                                                                                        Meaning: reference.linear_w4a8
//   up to 31 tokens    integer_strips.cuh    weights from memory to the registers of the one warp that needs them
//   more               integer_tiles.cuh     128 (or 64) rows of x times 128 rows of W, both in shared memory
//
//   pieces    group   |      0      |      1      |     Where a group is long, or blocks are few, its columns are cut:
//             piece   | 0 | 1 | 2   | 3 | 4 | 5   |     the int32 products of every piece go to scratch, and
//                                                       linear_w4a8_pieces_kernel adds them up.
//
// Requires   x.sums: of the codes of each of the weight's groups. Tiles: 4-bit containers, groups of whole chunks;
//            strips take every other shape.
// Sums in    int32 within a piece, int64 over the pieces of a group: exact. Groups in float32 in index order: the bits
//            of the CPU's kernels.
// Limited by reading the weights once while tokens are few; by the tensor cores where they are many.
#include "cuda.h"
#include "dispatch.h"
#include "integer_strips.cuh"
#include "integer_tiles.cuh"

namespace prequant::cuda {

namespace {

// A piece's product is at most kPieceColumns 255 255 whatever the codes and zero points.
constexpr int64_t kPieceColumns = 32768;
static_assert(kPieceColumns * 255 * 255 <= INT32_MAX && kPieceColumns <= kMaxColumns<2> &&
              kPieceColumns <= kMaxColumns<4> && kPieceColumns <= kMaxColumns<8>);

// ---- pieces ----

constexpr int kPiecesRows = 8, kPiecesThreads = kPiecesRows * kTileColumns / kQuad;

__global__ void __launch_bounds__(kPiecesThreads)
    linear_w4a8_pieces_kernel(IntegerProduct product, Epilogue epilogue, unsigned token_blocks) {
    PREQUANT_SHARED(scratch, Vector<float, kQuad>[(kFinishFloats<kPiecesRows, kTileColumns> + kQuad - 1) / kQuad]);
    const Activations& x = product.x;
    const Weight& weight = product.weight;
    const int64_t M = x.M, N = weight.N, G = weight.G;
    const int64_t m0 = int64_t(blockIdx.x % token_blocks) * kPiecesRows,
                  n0 = int64_t(blockIdx.x / token_blocks) * kTileColumns;
    finish_tile<kPiecesThreads, kPiecesRows, kTileColumns>(
        epilogue, m0, n0, false, scratch[0].at, [&](int row, int column) {
            const int64_t m = m0 + row, token = x.per_token ? m : 0;
            QuadSums quad{};
            for (int64_t g = 0; g < G; ++g) {
                int64_t sums[kQuad] = {};
                for (int64_t i = g * product.pieces_a_group; i < (g + 1) * product.pieces_a_group; ++i) {
                    const int32_t* from = product.pieces + (i * M + m) * N + n0 + column;
                    if (N % kQuad == 0) {
                        const auto part = load<Vector<int32_t, kQuad>>(from);
#pragma unroll
                        for (int v = 0; v < kQuad; ++v) sums[v] += part.at[v];
                    } else {
#pragma unroll
                        for (int v = 0; v < kQuad; ++v) sums[v] += n0 + column + v < N ? from[v] : 0;
                    }
                }
                const int64_t offset = x.sums[m * G + g] - product.group_size * x.zero_point[token];
#pragma unroll
                for (int v = 0; v < kQuad; ++v) {
                    const int64_t n = n0 + column + v < N ? n0 + column + v : N - 1,
                                  block = (weight.scale_rows == 1 ? 0 : n) * G + g;
                    const float value = __ll2float_rn(sums[v] - weight.zero_point[block] * offset);
                    quad.at[v] = __fadd_rn(quad.at[v], __fmul_rn(value, weight.scale[block]));
                }
            }
            const float scale = x.scale[token];
#pragma unroll
            for (int v = 0; v < kQuad; ++v) quad.at[v] = __fmul_rn(quad.at[v], scale);
            return quad;
        });
}

// ---- rows that do not lie on 16 bytes ----

// A copy of the codes that does: rows of `pitch` bytes, the last ones 0.
__global__ void linear_w4a8_align_kernel(const uint8_t* __restrict__ codes, int64_t M, int64_t K, int64_t pitch,
                                         uint8_t* __restrict__ aligned) {
    const int64_t m = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
    if (m >= M) return;
    for (int64_t k = (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * 4; k < pitch;
         k += int64_t(gridDim.y) * blockDim.x * 4) {
        uint32_t word = 0;
        for (int i = 0; i < 4; ++i)
            if (k + i < K) word |= static_cast<uint32_t>(codes[m * K + k + i]) << (8 * i);
        store(aligned + m * pitch + k, word);
    }
}

// ---- dispatch ----

template <int kContainer, int kTokenTiles, int kStrips, int kSlices>
void launch_strips(const IntegerProduct& product, const Epilogue& epilogue, int64_t pieces, Stream stream) {
    using S = StripShapes<kTokenTiles, kStrips, kSlices>;
    const int64_t token_blocks = ceil_div(product.x.M, S::kTokens);
    dim3 grid = grid_of("linear_w4a8", token_blocks * ceil_div(product.weight.N, S::kColumns));
    grid.y = static_cast<unsigned>(pieces);
    launch("linear_w4a8_strips_kernel", linear_w4a8_strips_kernel<kContainer, kTokenTiles, kStrips, kSlices>,
           {.grid = grid, .block = dim3(S::kThreads), .stream = stream}, product, epilogue,
           static_cast<unsigned>(token_blocks));
}

template <int kRows, bool kIsGrouped>
void launch_tiles(const IntegerProduct& product, const Epilogue& epilogue, int64_t pieces, Stream stream) {
    dim3 grid = grid_of("linear_w4a8", ceil_div(product.x.M, kRows));
    grid.y = static_cast<unsigned>(ceil_div(product.weight.N, kTileColumns));
    grid.z = static_cast<unsigned>(pieces);
    launch("linear_w4a8_tiles_kernel", linear_w4a8_tiles_kernel<kRows, kIsGrouped>,
           {.grid = grid, .block = dim3(kTileThreads), .stream = stream, .shared_bytes = kTileBytes<kRows>}, product,
           epilogue);
}

using Launch = void (*)(const IntegerProduct&, const Epilogue&, int64_t pieces, Stream);

struct Route {
    Launch run;
    int64_t rows, columns;  // of y that a block makes
};

// Tokens, columns and slices multiply to 8 warps; with groups a block is 2 warps, since no two may share the sums of a
// strip.
template <int kContainer>
Route strips_for(int64_t M, bool is_grouped) {
    if (M <= 7)
        return is_grouped ? Route{launch_strips<kContainer, 1, 2, 1>, 7, 32}
                          : Route{launch_strips<kContainer, 1, 1, 8>, 7, 16};
    if (M <= 15)
        return is_grouped ? Route{launch_strips<kContainer, 2, 2, 1>, 15, 32}
                          : Route{launch_strips<kContainer, 2, 2, 4>, 15, 32};
    return is_grouped ? Route{launch_strips<kContainer, 4, 2, 1>, 31, 32}
                      : Route{launch_strips<kContainer, 4, 4, 2>, 31, 64};
}

Route route_for(const IntegerProduct& product, bool is_grouped) {
    const int64_t M = product.x.M;
    if (product.weight.container == 4 && M > 31 && (product.weight.G == 1 || product.group_size % kChunkColumns == 0)) {
        if (is_grouped) return {launch_tiles<64, true>, 64, kTileColumns};
        return M <= 64 ? Route{launch_tiles<64, false>, 64, kTileColumns}
                       : Route{launch_tiles<128, false>, 128, kTileColumns};
    }
    switch (product.weight.container) {
        case 2: return strips_for<2>(M, is_grouped);
        case 4: return strips_for<4>(M, is_grouped);
        default: return strips_for<8>(M, is_grouped);
    }
}

// Into how many pieces the columns of a group are cut. Groups are cut only where their sums would not fit int32: the
// order of their float sums is fixed.
int64_t pieces_for(const Route& route, const IntegerProduct& product) {
    constexpr int64_t kWorthwhileColumns = 1024;  // what pays for writing the products and reading them again
    const int64_t K = product.group_size, fewest = std::max<int64_t>(1, ceil_div(K, kPieceColumns));
    if (product.weight.G > 1) return fewest;
    const int64_t blocks = ceil_div(product.x.M, route.rows) * ceil_div(product.weight.N, route.columns);
    return std::max(fewest, std::min<int64_t>(current_gpu().multiprocessors / blocks, K / kWorthwhileColumns));
}

}  // namespace

void linear_w4a8(Activations x, const Matrix* raw, Weight weight, Outliers outliers, const float* bias, MutableMatrix y,
                 Stream stream) {
    if (x.M == 0 || weight.N == 0) return;
    if (weight.K == 0) weight.G = 1, outliers.r = 0;  // all that is left is the bias
    const int64_t size = weight.K / weight.G;
    IntegerProduct product{
        .x = x,
        .weight = weight,
        .group_size = size,
        .chunks = chunks_along(weight.K),
        .codes = x.codes,
        .pitch = weight.K,
        .is_ragged = weight.G > 1 && size % kPieceCodes != 0,
        .pieces = nullptr,
        .piece_columns = 0,
        .pieces_a_group = 0,
    };
    if (weight.K % kPieceCodes != 0 || !is_aligned(x.codes, kPieceCodes)) {
        product.pitch = ceil_div(weight.K, kPieceCodes) * kPieceCodes;
        auto* const aligned = static_cast<uint8_t*>(stream.scratch(x.M * product.pitch));
        launch("linear_w4a8_align_kernel", linear_w4a8_align_kernel, row_grid(x.M, product.pitch / 4, stream), x.codes,
               x.M, weight.K, product.pitch, aligned);
        product.codes = aligned;
    }

    Source source;
    if (raw != nullptr)
        source.floats = *raw;
    else
        source.codes = x;
    Epilogue epilogue{source, outliers, nullptr, bias, y, false};
    epilogue.is_wide = weight.N % kQuad == 0 && is_aligned(y.data, y.dtype == Dtype::float32 ? 16 : 8) &&
                       is_aligned(bias, kQuad * sizeof(float));
    if (outliers.r > 0 && outliers.axis == 0) {
        float* const side = static_cast<float*>(stream.scratch(x.M * outliers.r * int64_t{sizeof(float)}));
        outlier_side(source, outliers, side, stream);
        epilogue.side = side;
    }

    const bool is_cut = size > kPieceColumns;
    const Route route = route_for(product, weight.G > 1 && !is_cut);
    const int64_t pieces = pieces_for(route, product);
    if (pieces == 1) return route.run(product, epilogue, 1, stream);

    product.piece_columns = ceil_div(ceil_div(size, pieces), kStepColumns) * kStepColumns;
    product.pieces_a_group = ceil_div(size, product.piece_columns);
    const int64_t count = weight.G * product.pieces_a_group;
    product.pieces = static_cast<int32_t*>(stream.scratch(count * x.M * weight.N * int64_t{sizeof(int32_t)}));
    route.run(product, epilogue, count, stream);
    const int64_t token_blocks = ceil_div(x.M, kPiecesRows);
    launch("linear_w4a8_pieces_kernel", linear_w4a8_pieces_kernel,
           {.grid = grid_of("linear_w4a8", token_blocks * ceil_div(weight.N, kTileColumns)),
            .block = dim3(kPiecesThreads),
            .stream = stream},
           product, epilogue, static_cast<unsigned>(token_blocks));
}

}  // namespace prequant::cuda
