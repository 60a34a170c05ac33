// linear_w4a16 of at most 8 tokens: the weight is the A operand, tokens are the 8 columns of B.
//
//                  k    chunk 0  1  2 ... 7 | 8  9 ...     A block makes 16 (or 32) rows n, all columns k. Warp v reads
//     n 0 .. 15     [    warp 0  1  2     7 | 0  1 ... ]   chunks v, v + 8, ... straight into registers, kAhead of them
//                                                          in flight: a chunk has one reader, so shared memory would be
//   y^T (16 n x 8 m) += W (16 n x 16 k) x^T (16 k x 8 m)   a detour. x lies there, a slab of columns at a time. The 8
//                                                          warps' sums are added in order at the end.
//
// A product on plain arithmetic units would take a conversion a code and a multiplication a code and token: beyond 100
// instructions for 32 codes at one token already, against 40 here.
#pragma once

#include "dispatch.h"
#include "tile.cuh"

namespace prequant::cuda {

constexpr int kGemvWarps = 8, kGemvTokens = 8, kAhead = 4;
// A slab is a multiple of kSlabChunks, so that the rings of registers go on across it.
constexpr int kSlabBytes = 32768, kSlabChunks = kGemvWarps * kAhead;

// Shared memory once the sums are made: those of each warp, 16 outliers of each row, and of each token.
constexpr int kValuePitch = 17;
PREQUANT_HOST_DEVICE constexpr int gemv_sums(int rows) { return kGemvTokens * rows + kGemvTokens / 2 * 8; }

template <typename T, int kBlocks>
__global__ void __launch_bounds__(kGemvWarps* kWarp, kBlocks == 1 ? 3 : 2) gemv_kernel(Product p, int slab_chunks) {
    constexpr int kRows = kBlocks * 16, kSums = gemv_sums(kRows);
    static_assert(kGemvTokens * kRows <= kGemvWarps * kWarp);
    uint8_t* slab = dynamic_shared<uint8_t>();  // (M, slab_chunks * 64) of x; unit u of row m lies at u ^ (m % 8)
    const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp,
              M = static_cast<int>(p.M);
    const Weight& w = p.weight;
    const int64_t n0 = int64_t(blockIdx.x) * kRows;
    const int chunks = as_int(chunks_along(p.depth)), row_bytes = slab_chunks * static_cast<int>(kChunkColumns) * 2;
    const bool is_grouped = p.group_chunks > 0;
    const auto row_of = [&](int b, int nn) {
        const int64_t n = n0 + b * 16 + nn * 8 + lane / 4;
        return n < w.N ? n : w.N - 1;
    };

    ZeroPoints zero[kBlocks];  // of the lane's rows, in the group at hand
    float scale[kBlocks][2];
    const auto enter_group = [&](int group) {
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
            uint32_t of[2];
#pragma unroll
            for (int nn = 0; nn < 2; ++nn) {
                const int64_t block = (w.scale_rows == 1 ? 0 : row_of(b, nn)) * w.G + group;
                of[nn] = w.zero_point[block] * 0x10001u, scale[b][nn] = w.scale[block];
            }
            zero[b] = zero_points<T, 4>(of[0], of[1]);
        }
    };
    struct Fetched {
        Vector<uint32_t, 4> codes[kBlocks];
    };
    const uint8_t* from = w.packed + n0 / kChunkRows * chunks * chunk_bytes(4) + lane * 16;
    const auto fetch = [&](int chunk, Fetched& to) {
        if (chunk >= chunks) return;
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
            uint4 words = make_uint4(0, 0, 0, 0);
            if (b == 0 || n0 + b * kChunkRows < w.N)
                words = __ldcs(reinterpret_cast<const uint4*>(from + (int64_t(b) * chunks + chunk) * chunk_bytes(4)));
            to.codes[b] = {words.x, words.y, words.z, words.w};
        }
    };

    float sums[kBlocks][4] = {}, totals[kBlocks][4] = {};
    const auto leave_group = [&] {
#pragma unroll
        for (int b = 0; b < kBlocks; ++b)
#pragma unroll
            for (int r = 0; r < 4; ++r)
                totals[b][r] = __fmaf_rn(sums[b][r], scale[b][r / 2], totals[b][r]), sums[b][r] = 0;
    };
    // Lanes of tokens past M read the last token's row: their columns of the result are not written.
    const int token = lane % 8 < M ? lane % 8 : M - 1;
    const auto multiply = [&](int chunk, int chunk_of_slab, const Fetched& fetched) {
        if (is_grouped) enter_group(chunk / p.group_chunks);
        const uint8_t* row = slab + token * row_bytes + chunk_of_slab * static_cast<int>(kChunkColumns) * 2;
#pragma unroll
        for (int j = 0; j < 4; j += 2) {
            uint32_t x[4];
            ldmatrix_x4(x, row + ((j * 2 + lane / 8) ^ token) * 16);
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int b = 0; b < kBlocks; ++b) {
                    const Registers weight = registers_of<T, 4>({fetched.codes[b].at[j + half]}, zero[b]);
                    mma_m16n8k16<T>(sums[b], weight.at, {x[half * 2], x[half * 2 + 1]});
                }
        }
        if (is_grouped) leave_group();
    };

    if (!is_grouped) enter_group(0);
    Fetched ring[kAhead];
#pragma unroll
    for (int d = 0; d < kAhead; ++d) fetch(warp + d * kGemvWarps, ring[d]);
    for (int slab0 = 0; slab0 < chunks; slab0 += slab_chunks) {
        const int end = min(slab0 + slab_chunks, chunks);
        if (slab0 > 0) __syncthreads();
        for (int m = 0; m < M; ++m)
            for (int unit = thread; unit < (end - slab0) * 8; unit += kGemvWarps * kWarp) {
                const int64_t k = int64_t(slab0) * kChunkColumns + unit * 8;
                cp_async_16(slab + m * row_bytes + (unit ^ m) * 16, static_cast<const T*>(p.x) + m * p.stride + k,
                            k < p.depth ? 16 : 0);
            }
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();
        for (int chunk = slab0 + warp; chunk < end; chunk += kSlabChunks)
#pragma unroll
            for (int d = 0; d < kAhead; ++d) {
                const int at = chunk + d * kGemvWarps;
                if (at < end) {
                    multiply(at, at - slab0, ring[d]);
                    fetch(at + kSlabChunks, ring[d]);
                }
            }
    }
    if (!is_grouped) leave_group();

    // A thread makes one number of the result: row thread % kRows of token thread / kRows. Two tokens' sums lie side by
    // side, the next two 8 banks on.
    const auto place = [](int m, int row) { return m * kRows + m / 2 * 8 + row; };
    float* warp_sums = dynamic_shared<float>();
    __syncthreads();
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
        for (int r = 0; r < 4; ++r)
            warp_sums[warp * kSums + place(lane % 4 * 2 + r % 2, b * 16 + r / 2 * 8 + lane / 4)] = totals[b][r];
    __syncthreads();
    const int m = thread / kRows, row = thread % kRows;
    const int64_t n = n0 + row;
    const bool is_written = m < M && n < w.N;
    float sum = 0;
    if (is_written)
        for (int v = 0; v < kGemvWarps; ++v) sum += warp_sums[v * kSums + place(m, row)];

    // (rows, 16) and (16, tokens).
    float *values = warp_sums + kGemvWarps * kSums, *gathered = values + kRows * kValuePitch;
    for (int64_t j0 = 0; j0 < p.gathered; j0 += 16) {
        // The pitch is odd: rows meet different banks.
        const int count = p.gathered - j0 < 16 ? static_cast<int>(p.gathered - j0) : 16, pitch = count | 1;
        __syncthreads();
        for (int e = thread; e < kRows * count; e += kGemvWarps * kWarp)
            if (n0 + e / count < w.N)
                values[e / count * pitch + e % count] =
                    p.values[(n0 + e / count) * p.along_column + (j0 + e % count) * p.along_outlier];
        if (thread < count * M) {
            const int64_t k = p.dims[j0 + thread / M];
            gathered[thread] =
                k >= 0 && k < p.depth ? to_float(static_cast<const T*>(p.x)[thread % M * p.stride + k]) : 0;
        }
        __syncthreads();
        if (is_written)
            for (int j = 0; j < count; ++j) sum = __fmaf_rn(gathered[j * M + m], values[row * pitch + j], sum);
    }
    if (!is_written) return;
    for (int64_t j = 0; j < p.side_columns; ++j)
        if (p.dims[j] == n) sum += p.side[m * p.side_columns + j];
    if (p.bias != nullptr) sum += p.bias[n];
    static_cast<T*>(p.out)[m * p.columns + n] = from_float<T>(sum);
}

template <typename T>
void launch_gemv(const Product& p, const Gpu& gpu, Stream stream) {
    // 32 rows a block halve the reads of x, which from 4 tokens on outweigh those of the codes; 16 rows make more
    // blocks.
    const bool is_double = p.M > 3 && p.columns >= int64_t{64} * gpu.multiprocessors;
    const int64_t rows = is_double ? 32 : 16, chunks = chunks_along(p.depth);
    const int64_t fitting = kSlabBytes / (p.M * kChunkColumns * 2) / kSlabChunks * kSlabChunks,
                  slab_chunks = std::min(fitting, chunks);
    const int64_t end_bytes =
        (kGemvWarps * gemv_sums(static_cast<int>(rows)) + rows * kValuePitch + 16 * kGemvTokens) * 4;
    launch("gemv_kernel", is_double ? gemv_kernel<T, 2> : gemv_kernel<T, 1>,
           {.grid = grid_of("linear_w4a16", ceil_div(p.columns, rows)),
            .block = dim3(kGemvWarps * kWarp),
            .stream = stream,
            .shared_bytes = static_cast<size_t>(std::max(slab_chunks * kChunkColumns * 2 * p.M, end_bytes))},
           p, static_cast<int>(slab_chunks));
}

}  // namespace prequant::cuda
