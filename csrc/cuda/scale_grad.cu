// gradient[n, g] = sum over m of grad_y[m, n] * (sum over k in g of x[m, k] (code - zero_point)[n, k])
//               = sum over k in g of T[n, k] (code - zero_point)[n, k],  T = grad_y^T x   Meaning: reference.scale_grad
//
//           64 columns k                  A block makes one tile of T over one part of M, in runs of 256 tokens: a
//         +--------------+                thread 8 x 8 sums in registers, from 16 tokens of grad_y and x in shared
//     128 |              |                memory (two buffers: the next 16 come while these are used). After a run T
//    rows |      T       | -> thread n    goes to shared memory, and thread n walks along its row of the tile: each
//       n |              |                group that it meets adds one number to
//         +--------------+                    partial[part][tile of k + g][n]
//
//   Groups and tiles both grow with k, so their sum tells the pieces apart. The second pass adds the pieces of (n, g).
//
// Requires   canonical weight rows. Quads of 4 numbers, and vectors of 16 packed codes, need a row of whole ones and an
//            aligned pointer; else they are read one by one.
// Sums in    float32 over the tokens of a run in turn, then over the columns of a piece in turn, compensated, then over
//            runs; float64 over parts and tiles.
// Limited by float32 multiply-adds: 2 M N K operations.
#include "cuda.h"
#include "outliers.cuh"

namespace prequant::cuda {

namespace {

constexpr int kTileRows = 128, kTileColumns = 64, kThreads = 128, kVectorCodes = 16;
// kDepth: tokens in shared memory; kRun: tokens that one register sums. Longer runs lose what a library's product
// keeps.
constexpr int kDepth = 16, kRun = 256;
constexpr int kGradQuads = kDepth * kTileRows / kQuad / kThreads,
              kSourceQuads = kDepth * kTileColumns / kQuad / kThreads;
constexpr int kBufferFloats = kDepth * (kTileRows + kTileColumns);
// Of T: rows then begin 4 banks apart, and neither quads of a row nor of a column collide.
constexpr int kPitch = kTileColumns + kQuad;
constexpr int kSharedFloats = std::max(2 * kBufferFloats, kTileRows* kPitch);
using Quad = Vector<float, kQuad>;

struct Problem {
    Matrix grad_y;
    Source x;
    Weight weight;
    bool has_grad_quads, has_source_quads, has_code_vectors;
    int64_t M, part_rows, column_tiles, pieces;
    unsigned row_tiles;
};

// Columns c to c + 3 of row m; what lies outside the matrix is 0.
__device__ __forceinline__ Quad fetch_floats(const Matrix& from, int64_t m, int64_t c, bool is_whole) {
    Quad quad{};
    const int64_t at = m * from.cols + c;
    if (is_whole && from.dtype == Dtype::float32) {
        quad = load<Quad>(static_cast<const float*>(from.data) + at);
    } else if (is_whole && from.dtype == Dtype::float16) {
        const auto halves = load<Vector<__half, kQuad>>(static_cast<const __half*>(from.data) + at);
#pragma unroll
        for (int i = 0; i < kQuad; ++i) quad.at[i] = to_float(halves.at[i]);
    } else if (is_whole) {
        const auto halves = load<Vector<__nv_bfloat16, kQuad>>(static_cast<const __nv_bfloat16*>(from.data) + at);
#pragma unroll
        for (int i = 0; i < kQuad; ++i) quad.at[i] = to_float(halves.at[i]);
    } else {
        for (int i = 0; i < kQuad; ++i)
            if (c + i < from.cols) quad.at[i] = float_at(from.data, from.dtype, at + i);
    }
    return quad;
}

__device__ __forceinline__ Quad fetch_source(const Source& x, int64_t m, int64_t c, bool is_whole) {
    if (!x.has_codes()) return fetch_floats(x.floats, m, c, is_whole);
    const int64_t token = x.token(m);
    const float scale = x.codes.scale[token], bias = kCodeBias + static_cast<float>(x.codes.zero_point[token]);
    const uint8_t* from = x.codes.codes + m * x.codes.K + c;
    Quad quad{};
    if (is_whole) {
        const auto word = load<uint32_t>(from);
#pragma unroll
        for (int i = 0; i < kQuad; ++i) quad.at[i] = (biased_code(word, i) - bias) * scale;
    } else {
        for (int i = 0; i < kQuad; ++i)
            if (c + i < x.codes.K) quad.at[i] = (biased_code(from[i], 0) - bias) * scale;
    }
    return quad;
}

// The 16 tokens from m on, of which those before `end` count: into registers, and from there into a buffer (kDepth,
// 128), (kDepth, 64).
struct Fetched {
    Quad grad[kGradQuads], source[kSourceQuads];
};

__device__ __forceinline__ Fetched fetch(const Problem& problem, int64_t m, int64_t end, int64_t first_row,
                                         int64_t first_column) {
    Fetched fetched;
    const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
    for (int i = 0; i < kGradQuads; ++i) {
        const int at = (thread + i * kThreads) * kQuad;
        const int64_t row = m + at / kTileRows, n = first_row + at % kTileRows;
        fetched.grad[i] = row < end && n < problem.grad_y.cols
                              ? fetch_floats(problem.grad_y, row, n, problem.has_grad_quads)
                              : Quad{};
    }
#pragma unroll
    for (int i = 0; i < kSourceQuads; ++i) {
        const int at = (thread + i * kThreads) * kQuad;
        const int64_t row = m + at / kTileColumns, k = first_column + at % kTileColumns;
        fetched.source[i] =
            row < end && k < problem.weight.K ? fetch_source(problem.x, row, k, problem.has_source_quads) : Quad{};
    }
    return fetched;
}

__device__ __forceinline__ void put(const Fetched& fetched, float* buffer) {
    const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
    for (int i = 0; i < kGradQuads; ++i) store(buffer + (thread + i * kThreads) * kQuad, fetched.grad[i]);
#pragma unroll
    for (int i = 0; i < kSourceQuads; ++i)
        store(buffer + kDepth * kTileRows + (thread + i * kThreads) * kQuad, fetched.source[i]);
}

// Thread (a, b) of 16 x 8 has rows 4a .. 4a + 3 and 64 more below, columns 4b .. 4b + 3 and 32 more to the right.
__device__ __forceinline__ void multiply(const float* buffer, float (&sums)[8][8]) {
    const int a = static_cast<int>(threadIdx.x) / 8, b = static_cast<int>(threadIdx.x) % 8;
#pragma unroll
    for (int m = 0; m < kDepth; ++m) {
        const float* grad = buffer + m * kTileRows + a * kQuad;
        const float* source = buffer + kDepth * kTileRows + m * kTileColumns + b * kQuad;
        const Quad rows[2] = {load<Quad>(grad), load<Quad>(grad + kTileRows / 2)},
                   columns[2] = {load<Quad>(source), load<Quad>(source + kTileColumns / 2)};
#pragma unroll
        for (int i = 0; i < 8; ++i)
#pragma unroll
            for (int j = 0; j < 8; ++j)
                sums[i][j] = __fmaf_rn(rows[i / 4].at[i % 4], columns[j / 4].at[j % 4], sums[i][j]);
    }
}

// 16 codes of a canonical row from column k on, a multiple of 16; past the row's end there are none.
template <int kContainer>
using Codes = Vector<uint8_t, kVectorCodes * kContainer / 8>;

template <int kContainer>
__device__ __forceinline__ Codes<kContainer> fetch_codes(const uint8_t* row, int64_t k, int64_t row_bytes,
                                                         bool is_whole) {
    constexpr int kBytes = kVectorCodes * kContainer / 8;
    const int64_t at = k / kVectorCodes * kBytes;
    if (is_whole) return load<Codes<kContainer>>(row + at);
    Codes<kContainer> codes{};
#pragma unroll
    for (int i = 0; i < kBytes; ++i)
        if (at + i < row_bytes) codes.at[i] = row[at + i];
    return codes;
}

// Thread n: T times the weight's steps along row n of the tile, one number for each group that the tile meets.
template <int kContainer>
__device__ __forceinline__ void add_groups(const Problem& problem, const float* tile, int64_t n, int64_t column_tile,
                                           bool is_first, float* partial) {
    const Weight& weight = problem.weight;
    const int64_t first = column_tile * kTileColumns, size = weight.K / weight.G,
                  row_bytes = packed_row_bytes(weight.K, kContainer);
    const int columns = static_cast<int>(weight.K - first < kTileColumns ? weight.K - first : kTileColumns);
    const uint8_t* codes = weight.packed + n * row_bytes;
    const uint8_t* zero_points = weight.zero_point + (weight.scale_rows == 1 ? 0 : n) * weight.G;
    const float* row = tile + static_cast<int>(threadIdx.x) * kPitch;

    int64_t g = first / size, left = (g + 1) * size - first;  // columns left of group g
    // lost: what the roundings of sum left out, which costs less than float64.
    float zero = zero_points[g], sum = 0, lost = 0;
    for (int begin = 0; begin < columns; begin += kVectorCodes) {
        const Codes<kContainer> packed =
            fetch_codes<kContainer>(codes, first + begin, row_bytes, problem.has_code_vectors);
#pragma unroll
        for (int i = 0; i < kVectorCodes; i += kQuad) {
            const Quad values = load<Quad>(row + begin + i);
#pragma unroll
            for (int c = 0; c < kQuad; ++c) {
                const int k = begin + i + c;
                if (k >= columns) continue;
                const float term =
                    __fmul_rn(values.at[c], static_cast<float>(code_at(packed.at, i + c, kContainer)) - zero);
                const float next = __fadd_rn(sum, term), part = __fsub_rn(next, sum);
                lost = __fadd_rn(lost, __fadd_rn(__fsub_rn(sum, __fsub_rn(next, part)), __fsub_rn(term, part)));
                sum = next;
                if (--left > 0 && k + 1 < columns) continue;
                float* to = partial + (column_tile + g) * weight.N + n;
                *to = is_first ? sum + lost : *to + (sum + lost);
                sum = lost = 0;
                if (k + 1 < columns) zero = zero_points[++g], left = size;
            }
        }
    }
}

template <int kContainer>
__global__ void __launch_bounds__(kThreads, 2) scale_grad_kernel(Problem problem, float* __restrict__ partial) {
    float* const shared = dynamic_shared<float>();
    const int thread = static_cast<int>(threadIdx.x), a = thread / 8, b = thread % 8;
    const unsigned row_tile = blockIdx.x % problem.row_tiles;
    const int64_t rest = blockIdx.x / problem.row_tiles, column_tile = rest % problem.column_tiles,
                  part = rest / problem.column_tiles;
    const int64_t first_row = int64_t(row_tile) * kTileRows, first_column = column_tile * kTileColumns,
                  n = first_row + thread;
    const int64_t first = part * problem.part_rows,
                  end = first + problem.part_rows < problem.M ? first + problem.part_rows : problem.M;

    int64_t m = first;
    do {  // once without tokens too: the pieces are then 0
        const int64_t run_end = m + kRun < end ? m + kRun : end;
        float sums[8][8] = {};
        Fetched next = fetch(problem, m, run_end, first_row, first_column);
        for (int buffer = 0; m < run_end; m += kDepth, buffer ^= 1) {
            put(next, shared + buffer * kBufferFloats);
            __syncthreads();  // the other buffer's readers are past their last turn, too
            if (m + kDepth < run_end) next = fetch(problem, m + kDepth, run_end, first_row, first_column);
            multiply(shared + buffer * kBufferFloats, sums);
        }
        m = run_end;

        __syncthreads();
#pragma unroll
        for (int i = 0; i < 8; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const Quad quad{
                    {sums[i][4 * half], sums[i][4 * half + 1], sums[i][4 * half + 2], sums[i][4 * half + 3]}};
                store(shared + (a * kQuad + i % 4 + i / 4 * (kTileRows / 2)) * kPitch + b * kQuad +
                          half * (kTileColumns / 2),
                      quad);
            }
        __syncthreads();
        if (n < problem.weight.N)
            add_groups<kContainer>(problem, shared, n, column_tile, m <= first + kRun,
                                   partial + part * problem.pieces * problem.weight.N);
        __syncthreads();
    } while (m < end);
}

// Thread (n, g): its pieces are those of the tiles that hold a column of group g.
__global__ void scale_grad_sum_kernel(const float* __restrict__ partial, int64_t parts, int64_t pieces, int64_t N,
                                      int64_t K, int64_t G, float* __restrict__ gradient) {
    const int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, g = at / N, n = at % N, size = K / G;
    if (g >= G) return;
    double sum = 0;
    if (size > 0)
        for (int64_t part = 0; part < parts; ++part)
            for (int64_t tile = g * size / kTileColumns; tile <= ((g + 1) * size - 1) / kTileColumns; ++tile)
                sum += static_cast<double>(partial[(part * pieces + tile + g) * N + n]);
    gradient[n * G + g] = static_cast<float>(sum);
}

}  // namespace

void scale_grad(Matrix grad_y, Matrix x, Activations codes, Weight weight, float* gradient, Stream stream) {
    const int64_t M = grad_y.rows, N = weight.N, K = weight.K, G = weight.G;
    if (N == 0) return;
    constexpr int64_t kBlocks = 1024;  // enough to even out the last wave of a large GPU
    const int64_t row_tiles = ceil_div(N, kTileRows), column_tiles = ceil_div(K, kTileColumns),
                  runs = std::max<int64_t>(1, ceil_div(M, kRun));
    const int64_t part_runs =
                      ceil_div(runs, std::max<int64_t>(1, kBlocks / std::max<int64_t>(1, row_tiles * column_tiles))),
                  parts = ceil_div(runs, part_runs);
    const int64_t pieces = column_tiles + G;
    const Source source{x, codes};
    const auto has_quads = [](const void* data, int64_t cols, int64_t bytes) {
        return cols % kQuad == 0 && is_aligned(data, kQuad * bytes);
    };
    const auto number_bytes = [](Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; };
    const int64_t code_bytes = packed_row_bytes(kVectorCodes, weight.container);
    const Problem problem{
        .grad_y = grad_y,
        .x = source,
        .weight = weight,
        .has_grad_quads = has_quads(grad_y.data, N, number_bytes(grad_y.dtype)),
        .has_source_quads =
            source.has_codes() ? has_quads(codes.codes, K, 1) : has_quads(x.data, K, number_bytes(x.dtype)),
        .has_code_vectors =
            packed_row_bytes(K, weight.container) % code_bytes == 0 && is_aligned(weight.packed, code_bytes),
        .M = M,
        .part_rows = part_runs * kRun,
        .column_tiles = column_tiles,
        .pieces = pieces,
        .row_tiles = static_cast<unsigned>(row_tiles),
    };

    float* const partial =
        static_cast<float*>(stream.scratch(parts * pieces * N * static_cast<int64_t>(sizeof(float))));
    if (K > 0) {
        const auto kernel = weight.container == 2   ? scale_grad_kernel<2>
                            : weight.container == 4 ? scale_grad_kernel<4>
                                                    : scale_grad_kernel<8>;
        launch("scale_grad_kernel", kernel,
               {.grid = grid_of("scale_grad", row_tiles * column_tiles * parts),
                .block = dim3(kThreads),
                .stream = stream,
                .shared_bytes = kSharedFloats * sizeof(float)},
               problem, partial);
    }
    constexpr int kSumThreads = 256;
    launch("scale_grad_sum_kernel", scale_grad_sum_kernel,
           {.grid = grid_of("scale_grad", ceil_div(N * G, kSumThreads)), .block = dim3(kSumThreads), .stream = stream},
           partial, parts, pieces, N, K, G, gradient);
}

}  // namespace prequant::cuda
