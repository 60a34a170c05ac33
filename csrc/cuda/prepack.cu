// Canonical rows <-> tensor-core chunks of 16 rows x 64 columns (formats.h draws both).
//                                                                 Meaning: reference.tensor_core_chunks, canonical_rows
//   A warp moves a chunk. On the side of the rows, lane 4g + q holds half a row; on the side of the chunk, lane 4g + t
//   holds two columns out of every eight, of two rows. Either way these are 32 codes:
//
//                     columns 0 - 31     32 - 63              lane 4g + t     columns 8u + 2t and 8u + 2t + 1,
//         row g       lane 4g            lane 4g + 1                          u = 0 ... 7, of row g and of row g + 8
//         row g + 8   lane 4g + 2        lane 4g + 3
//
//   so the four lanes of a g have all of each other's codes, 8 for each: they transpose a 4 x 4 matrix of such parts by
//   shuffles.
//
// Requires   padding bits 0, aligned chunks. 128-bit accesses to the rows (64-bit at 2 bits) need K a multiple of their
//            codes and aligned rows; otherwise a lane moves its half row byte by byte.
// Limited by reading and writing each byte once.
#include "cuda.h"
#include "portable.cuh"

namespace prequant::cuda {

namespace {

constexpr int kQuadLanes = 4;  // lanes that exchange codes
constexpr int kPartCodes = 8;  // from each to each

template <int kContainer>
struct HalfRow {  // or a lane's part of a chunk: 32 codes, the first one in the lowest bits
    static constexpr int kWords = kContainer, kPieceWords = kContainer < 4 ? kContainer : 4,
                         kPieceBytes = 4 * kPieceWords, kBytes = 4 * kWords;
    using Piece = Vector<uint32_t, kPieceWords>;
    uint32_t words[kWords];
};

template <int kContainer>
struct Parts {
    static constexpr int kWords = kPartCodes * kContainer > 32 ? 2 : 1;
    uint32_t words[kQuadLanes][kWords];
};

template <int kContainer>
PREQUANT_HOST_DEVICE inline void copy_code(const uint32_t* from, int i, uint32_t* to, int j) {
    constexpr int kPerWord = 32 / kContainer;
    const uint32_t code = from[i / kPerWord] >> (i % kPerWord * kContainer) & ((1u << kContainer) - 1);
    to[j / kPerWord] |= code << (j % kPerWord * kContainer);
}

// Where code e of the part that lanes q and t share lies in the half row of lane q, and in the chunk's part of lane t.
PREQUANT_HOST_DEVICE constexpr int code_of_row(int t, int e) { return e / 2 * 8 + t * 2 + e % 2; }
PREQUANT_HOST_DEVICE constexpr int code_of_chunk(int q, int e) {
    return chunk_code(q / 2 * 8, q % 2 * 32 + e / 2 * 8 + e % 2);
}

// Part i of lane q becomes part q of lane i.
template <int kContainer>
__device__ void transpose_quads(Parts<kContainer>& parts) {
#pragma unroll
    for (int step = 1; step < kQuadLanes; step *= 2) {
        const bool is_upper = threadIdx.x & step;
#pragma unroll
        for (int i = 0; i < kQuadLanes; ++i) {
            if (i & step) continue;
#pragma unroll
            for (int w = 0; w < Parts<kContainer>::kWords; ++w) {
                uint32_t &low = parts.words[i][w], &high = parts.words[i + step][w];
                const uint32_t received = __shfl_xor_sync(kAllLanes, is_upper ? low : high, step);
                low = is_upper ? received : low;
                high = is_upper ? high : received;
            }
        }
    }
}

// The lane's half of row n, from byte `begin` of the row on; what the matrix lacks is 0.
template <int kContainer, bool kWide>
__device__ HalfRow<kContainer> load_half_row(const uint8_t* packed, int64_t n, int64_t N, int64_t begin,
                                             int64_t row_bytes) {
    using Half = HalfRow<kContainer>;
    Half half{};
    if (n >= N) return half;
    const uint8_t* from = packed + n * row_bytes + begin;
    if constexpr (kWide) {
#pragma unroll
        for (int p = 0; p < Half::kBytes / Half::kPieceBytes; ++p) {
            if (begin + p * Half::kPieceBytes >= row_bytes) continue;
            const auto piece = load<typename Half::Piece>(from + p * Half::kPieceBytes);
#pragma unroll
            for (int w = 0; w < Half::kPieceWords; ++w) half.words[p * Half::kPieceWords + w] = piece.at[w];
        }
    } else {
#pragma unroll
        for (int byte = 0; byte < Half::kBytes; ++byte)
            if (begin + byte < row_bytes) half.words[byte / 4] |= static_cast<uint32_t>(from[byte]) << (byte % 4 * 8);
    }
    return half;
}

template <int kContainer, bool kWide>
__device__ void store_half_row(const HalfRow<kContainer>& half, uint8_t* packed, int64_t n, int64_t N, int64_t begin,
                               int64_t row_bytes) {
    using Half = HalfRow<kContainer>;
    if (n >= N) return;
    uint8_t* to = packed + n * row_bytes + begin;
    if constexpr (kWide) {
#pragma unroll
        for (int p = 0; p < Half::kBytes / Half::kPieceBytes; ++p) {
            if (begin + p * Half::kPieceBytes >= row_bytes) continue;
            typename Half::Piece piece;
#pragma unroll
            for (int w = 0; w < Half::kPieceWords; ++w) piece.at[w] = half.words[p * Half::kPieceWords + w];
            store(to + p * Half::kPieceBytes, piece);
        }
    } else {
#pragma unroll
        for (int byte = 0; byte < Half::kBytes; ++byte)
            if (begin + byte < row_bytes) to[byte] = static_cast<uint8_t>(half.words[byte / 4] >> (byte % 4 * 8));
    }
}

template <int kContainer, bool kWide>
__global__ void prepack_kernel(const uint8_t* __restrict__ packed, int64_t N, int64_t K,
                               uint8_t* __restrict__ prepacked) {
    using Half = HalfRow<kContainer>;
    const int64_t strip = int64_t(blockIdx.x) * blockDim.y + threadIdx.y, chunks = chunks_along(K),
                  row_bytes = packed_row_bytes(K, kContainer);
    if (strip >= ceil_div(N, kChunkRows)) return;  // the same strip for the whole warp, so no lane misses the shuffles
    const int lane = threadIdx.x % kWarp;
    const int64_t n = strip * kChunkRows + lane / 4 + lane % 4 / 2 * 8;
    for (int64_t at = int64_t(blockIdx.y) * blockDim.x + threadIdx.x; at < chunks * kWarp;
         at += int64_t(gridDim.y) * blockDim.x) {
        const int64_t chunk = at / kWarp;
        const Half row =
            load_half_row<kContainer, kWide>(packed, n, N, (chunk * 2 + lane % 2) * Half::kBytes, row_bytes);
        Parts<kContainer> parts{};
#pragma unroll
        for (int e = 0; e < kQuadLanes * kPartCodes; ++e)
            copy_code<kContainer>(row.words, code_of_row(e / kPartCodes, e % kPartCodes), parts.words[e / kPartCodes],
                                  e % kPartCodes);
        transpose_quads<kContainer>(parts);
        Half codes{};
#pragma unroll
        for (int e = 0; e < kQuadLanes * kPartCodes; ++e)
            copy_code<kContainer>(parts.words[e / kPartCodes], e % kPartCodes, codes.words,
                                  code_of_chunk(e / kPartCodes, e % kPartCodes));
        store_half_row<kContainer, true>(codes, prepacked + (strip * chunks + chunk) * chunk_bytes(kContainer), lane,
                                         kWarp, 0, lane_bytes(kContainer));
    }
}

template <int kContainer, bool kWide>
__global__ void unprepack_kernel(const uint8_t* __restrict__ prepacked, int64_t N, int64_t K,
                                 uint8_t* __restrict__ packed) {
    using Half = HalfRow<kContainer>;
    const int64_t strip = int64_t(blockIdx.x) * blockDim.y + threadIdx.y, chunks = chunks_along(K),
                  row_bytes = packed_row_bytes(K, kContainer);
    if (strip >= ceil_div(N, kChunkRows)) return;
    const int lane = threadIdx.x % kWarp;
    const int64_t n = strip * kChunkRows + lane / 4 + lane % 4 / 2 * 8;
    for (int64_t at = int64_t(blockIdx.y) * blockDim.x + threadIdx.x; at < chunks * kWarp;
         at += int64_t(gridDim.y) * blockDim.x) {
        const int64_t chunk = at / kWarp;
        const Half codes = load_half_row<kContainer, true>(
            prepacked + (strip * chunks + chunk) * chunk_bytes(kContainer), lane, kWarp, 0, lane_bytes(kContainer));
        Parts<kContainer> parts{};
#pragma unroll
        for (int e = 0; e < kQuadLanes * kPartCodes; ++e)
            copy_code<kContainer>(codes.words, code_of_chunk(e / kPartCodes, e % kPartCodes),
                                  parts.words[e / kPartCodes], e % kPartCodes);
        transpose_quads<kContainer>(parts);
        Half row{};
#pragma unroll
        for (int e = 0; e < kQuadLanes * kPartCodes; ++e)
            copy_code<kContainer>(parts.words[e / kPartCodes], e % kPartCodes, row.words,
                                  code_of_row(e / kPartCodes, e % kPartCodes));
        store_half_row<kContainer, kWide>(row, packed, n, N, (chunk * 2 + lane % 2) * Half::kBytes, row_bytes);
    }
}

template <int kContainer>
void prepack_container(const uint8_t* packed, int64_t N, int64_t K, uint8_t* prepacked, Stream stream) {
    constexpr int kPieceBytes = HalfRow<kContainer>::kPieceBytes;
    const bool is_wide = K % (kPieceBytes * 8 / kContainer) == 0 && is_aligned(packed, kPieceBytes);
    launch("prepack_kernel", is_wide ? prepack_kernel<kContainer, true> : prepack_kernel<kContainer, false>,
           row_grid(ceil_div(N, kChunkRows), chunks_along(K) * kWarp, stream), packed, N, K, prepacked);
}

template <int kContainer>
void unprepack_container(const uint8_t* prepacked, int64_t N, int64_t K, uint8_t* packed, Stream stream) {
    constexpr int kPieceBytes = HalfRow<kContainer>::kPieceBytes;
    const bool is_wide = K % (kPieceBytes * 8 / kContainer) == 0 && is_aligned(packed, kPieceBytes);
    launch("unprepack_kernel", is_wide ? unprepack_kernel<kContainer, true> : unprepack_kernel<kContainer, false>,
           row_grid(ceil_div(N, kChunkRows), chunks_along(K) * kWarp, stream), prepacked, N, K, packed);
}

}  // namespace

void prepack(const uint8_t* packed, int64_t N, int64_t K, int container, uint8_t* prepacked, Stream stream) {
    if (N == 0 || K == 0) return;
    switch (container) {
        case 2: return prepack_container<2>(packed, N, K, prepacked, stream);
        case 4: return prepack_container<4>(packed, N, K, prepacked, stream);
        default: return prepack_container<8>(packed, N, K, prepacked, stream);
    }
}

void unprepack(const uint8_t* prepacked, int64_t N, int64_t K, int container, uint8_t* packed, Stream stream) {
    if (N == 0 || K == 0) return;
    switch (container) {
        case 2: return unprepack_container<2>(prepacked, N, K, packed, stream);
        case 4: return unprepack_container<4>(prepacked, N, K, packed, stream);
        default: return unprepack_container<8>(prepacked, N, K, packed, stream);
    }
}

}  // namespace prequant::cuda
