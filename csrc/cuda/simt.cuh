// linear_w4a16 of at most 3 tokens where tensor cores do not serve: float32 x, bfloat16 before sm_80, groups that end
// inside a chunk.
//
//               k    chunk 0  1  2 ... 7 | 8  9 ...     A block makes 16 rows n; warp v has chunks v, v + 8, ... of its
//   n 0 .. 15   [     warp 0  1  2     7 | 0  1 ... ]   part of K, kSimtAhead of them in flight. A lane's 32 codes of a
//                                                       chunk lie in 2 rows and 16 columns, two and two side by side: 8
//                                                       loads of 64 bits from x in shared memory serve a token, one
//                                                       address for the 8 lanes of a column, 32 bytes for all.
//
//   partial[part, m, n] = scale[n] sum over the part's k of x[m, k] (code[n, k] - zero_point[n])
//   finish (outliers.cuh) adds the parts and the rest.
//
// Sums in    float32: a lane in the order of its chunks, then the 4 lanes of a row by halves, then the warps in turn,
//            then the parts. A tensor's or a row's scale multiplies the sum, a group's each weight.
// Limited by reading the codes at one token, by the instructions at three: about 170 and 255 of them for 32 codes, 435
//            and 520 where groups have scales of their own. Dequantizing first would move 17 times the bytes of the
//            codes in float32.
#pragma once

#include "dispatch.h"
#include "outliers.cuh"

namespace prequant::cuda {

constexpr int kSimtWarps = 8, kSimtAhead = 4;
constexpr int kSimtSlab = kSimtWarps * kSimtAhead * static_cast<int>(kChunkColumns);

template <int kContainer, int kTokens, bool kIsGrouped>
__global__ void __launch_bounds__(kSimtWarps* kWarp, 2)
    simt_kernel(Matrix x, Weight w, int part_chunks, float* __restrict__ partial) {
    constexpr int kWords = kContainer < 4 ? kContainer : 4, kLoads = kContainer / kWords,
                  kCodesPerWord = 32 / kContainer, kRows = static_cast<int>(kChunkRows);
    PREQUANT_SHARED(slab, Vector<float, 2>[kTokens][kSimtSlab / 2]);
    PREQUANT_SHARED(warp_sums, float[kSimtWarps][kTokens][kRows]);
    const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp,
              M = static_cast<int>(x.rows);
    const int64_t strip = blockIdx.x, part = blockIdx.y, group_size = w.K / w.G;
    const int first = static_cast<int>(part) * part_chunks, chunks = static_cast<int>(chunks_along(w.K));
    const int end = min(first + part_chunks, chunks);
    const auto block_of_row = [&](int nn) {
        const int64_t n = strip * kRows + nn * 8 + lane / 4;
        return w.scale_rows == 1 ? 0 : (n < w.N ? n : w.N - 1) * w.G;
    };
    const int64_t first_block[2] = {block_of_row(0), block_of_row(1)};

    struct Codes {
        uint32_t words[kContainer];
    };
    const auto fetch = [&](int chunk, Codes& codes) {
        if (chunk >= end) return;
        const uint8_t* from =
            w.packed + (strip * chunks + chunk) * chunk_bytes(kContainer) + lane * lane_bytes(kContainer);
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
            const auto loaded = load<Vector<uint32_t, kWords>>(from + i * kWords * 4);
#pragma unroll
            for (int j = 0; j < kWords; ++j) codes.words[i * kWords + j] = loaded.at[j];
        }
    };

    float sums[kTokens][2] = {}, zero[2], scale[2];
    const auto enter_group = [&](int64_t group) {
#pragma unroll
        for (int nn = 0; nn < 2; ++nn)
            zero[nn] = kCodeBias + static_cast<float>(w.zero_point[first_block[nn] + group]),
            scale[nn] = w.scale[first_block[nn] + group];
    };
    const auto multiply = [&](int chunk, int pairs, const Codes& codes) {
#pragma unroll
        for (int u = 0; u < 8; ++u) {
            const int64_t k = int64_t(chunk) * kChunkColumns + u * 8;
            if constexpr (kIsGrouped) enter_group(k < w.K ? k / group_size : w.G - 1);
            float weights[2][2];
#pragma unroll
            for (int s = 0; s < 2; ++s)
#pragma unroll
                for (int nn = 0; nn < 2; ++nn) {
                    // Of lane 0; the other lanes have theirs in the same places.
                    const int i = chunk_code(nn * 8, u * 8 + s);
                    const uint32_t code =
                        codes.words[i / kCodesPerWord] >> (i % kCodesPerWord * kContainer) & ((1u << kContainer) - 1);
                    // kCodeBias + code: both this and the difference are exact.
                    weights[s][nn] = __uint_as_float(kCodeBiasBits | code) - zero[nn];
                    if constexpr (kIsGrouped) weights[s][nn] *= scale[nn];
                }
#pragma unroll
            for (int m = 0; m < kTokens; ++m) {
                const auto pair = load<Vector<float, 2>>(&slab[m][pairs + u * 4 + lane % 4]);
#pragma unroll
                for (int nn = 0; nn < 2; ++nn)
                    sums[m][nn] =
                        __fmaf_rn(pair.at[1], weights[1][nn], __fmaf_rn(pair.at[0], weights[0][nn], sums[m][nn]));
            }
        }
    };

    if constexpr (!kIsGrouped) enter_group(0);
    Codes ring[kSimtAhead];
#pragma unroll
    for (int d = 0; d < kSimtAhead; ++d) fetch(first + warp + d * kSimtWarps, ring[d]);
    for (int slab0 = first; slab0 < end; slab0 += kSimtWarps * kSimtAhead) {
        if (slab0 > first) __syncthreads();
        const int64_t k0 = int64_t(slab0) * kChunkColumns;
        const int columns = min(end - slab0, kSimtWarps * kSimtAhead) * static_cast<int>(kChunkColumns);
#pragma unroll
        for (int m = 0; m < kTokens; ++m)
            for (int i = thread; i < columns; i += kSimtWarps * kWarp)
                slab[m][i / 2].at[i % 2] = m < M && k0 + i < w.K ? float_at(x.data, x.dtype, m * w.K + k0 + i) : 0;
        __syncthreads();
#pragma unroll
        for (int d = 0; d < kSimtAhead; ++d) {
            const int of_slab = warp + d * kSimtWarps, chunk = slab0 + of_slab;
            if (chunk >= end) continue;
            multiply(chunk, of_slab * static_cast<int>(kChunkColumns) / 2, ring[d]);
            fetch(chunk + kSimtWarps * kSimtAhead, ring[d]);
        }
    }

#pragma unroll
    for (int m = 0; m < kTokens; ++m)
#pragma unroll
        for (int nn = 0; nn < 2; ++nn) {
            float sum = sums[m][nn];
            for (int half = 2; half > 0; half /= 2) sum += __shfl_xor_sync(kAllLanes, sum, half);
            if (lane % 4 == 0) warp_sums[warp][m][nn * 8 + lane / 4] = sum;
        }
    __syncthreads();
    const int m = thread / kRows, row = thread % kRows;
    const int64_t n = strip * kRows + row;
    if (m >= M || n >= w.N) return;
    float sum = warp_sums[0][m][row];
    for (int v = 1; v < kSimtWarps; ++v) sum += warp_sums[v][m][row];
    partial[(part * M + m) * w.N + n] = kIsGrouped ? sum : sum * w.scale[w.scale_rows == 1 ? 0 : n];
}

template <int kContainer>
auto simt_kernel_for(int64_t tokens, bool is_grouped) {
    return tokens == 1 ? (is_grouped ? simt_kernel<kContainer, 1, true> : simt_kernel<kContainer, 1, false>)
                       : (is_grouped ? simt_kernel<kContainer, kSimtTokens, true>
                                     : simt_kernel<kContainer, kSimtTokens, false>);
}

// The whole layer; side: the outliers' of axis 0, else null.
inline void linear_simt(Matrix x, const Weight& weight, const Outliers& outliers, const float* side, const float* bias,
                        MutableMatrix y, const Gpu& gpu, Stream stream) {
    const int64_t strips = ceil_div(weight.N, kChunkRows), chunks = chunks_along(weight.K);
    const Split split = split_reduction(strips, ceil_div(chunks, kSimtWarps), int64_t(gpu.multiprocessors) * 2);
    auto* partial = static_cast<float*>(stream.scratch(split.parts * x.rows * weight.N * 4));
    const bool is_grouped = weight.G > 1;
    dim3 grid = grid_of("linear_w4a16", strips);
    grid.y = static_cast<unsigned>(split.parts);
    launch("simt_kernel",
           weight.container == 2   ? simt_kernel_for<2>(x.rows, is_grouped)
           : weight.container == 4 ? simt_kernel_for<4>(x.rows, is_grouped)
                                   : simt_kernel_for<8>(x.rows, is_grouped),
           {.grid = grid, .block = dim3(kSimtWarps * kWarp), .stream = stream}, x, weight, split.steps * kSimtWarps,
           partial);
    finish(partial, split.parts, {.floats = x}, outliers, side, bias, y, stream);
}

}  // namespace prequant::cuda
