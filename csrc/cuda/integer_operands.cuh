// The two operands of the integer products, and the chunk of an mma that they meet in:
//     D[n, m] += W[n, k] s[m, k], s = code - 128.
//
//   W is the A operand (u8), x the B operand (s8) of m16n8k32. A lane 4g + t needs bytes k = 2t, 2t + 8, 2t + 1, 2t + 9
//   of a tile of 16 columns, because those are in one register of a chunk (formats.h). Activations are put in that
//   order once, on their way into shared memory: 4 byte permutations and 4 xors for 16 codes; ldmatrix then hands every
//   lane its bytes. Ordering fragments instead would take bytes of two other lanes, and would be done again by every
//   warp that reads the row.
//
//   4-bit word      nibble   7    6    5    4    3    2    1    0    w & 0x0f0f0f0f: rows g, registers 0 and 2 of A
//                   column  +9   +9   +1   +1   +8   +8   +0   +0    w & 0xf0f0f0f0: rows g + 8 times 16, registers 1
//                   row     g+8   g   g+8   g   g+8   g   g+8   g    and 3. Rows have sums of their own, so the 16 is
//                                                                    shifted out of the sum.
//
//   x in shared     row m: pieces of 16 bytes (a tile of 16 columns), piece p at place p ^ (m & 7), so that the eight
//                   rows that an ldmatrix reads meet eight different groups of banks.
//
// Overflow: a product is at most 128 * (largest weight operand); kMaxColumns of them fit int32. The launcher cuts K far
// below.
#pragma once

#include "ptx.cuh"

namespace prequant::cuda {

#ifdef __CUDACC__
#define PREQUANT_DEVICE __device__ __forceinline__
#else
#define PREQUANT_DEVICE PREQUANT_ALWAYS_INLINE
#endif

constexpr int kPieceCodes = 16, kTileTokens = 8, kStripRows = static_cast<int>(kChunkRows),
              kChunkPieces = static_cast<int>(kChunkColumns) / kPieceCodes;
constexpr uint32_t kOnes = 0x01010101u, kMiddle = 0x80808080u;  // kMiddle: code 128 four times, s = 0

using Piece = Vector<uint32_t, 4>;

// By how many bits rows g + 8 of a strip are shifted to the left.
template <int kContainer>
constexpr int kHighShift = kContainer == 8 ? 0 : kContainer;

template <int kContainer>
constexpr int64_t kMaxColumns = INT32_MAX / (128 * (((1 << kContainer) - 1) << kHighShift<kContainer>));
static_assert(kMaxColumns<4> == 69905 && kMaxColumns<8> == 65793);

// ---- activations ----

struct CodeRange {  // columns that count; the codes of others are 128, worth nothing
    int64_t begin, end;
};

// The bytes of a word from column k that lie in the range.
PREQUANT_DEVICE uint32_t range_mask(int64_t k, CodeRange range) {
    const auto below = [&](int64_t limit) {  // bytes of columns below it
        const int bytes = limit <= k ? 0 : limit >= k + 4 ? 4 : static_cast<int>(limit - k);
        return static_cast<uint32_t>((uint64_t{1} << (8 * bytes)) - 1);
    };
    return below(range.end) & ~below(range.begin);
}

// 16 codes of a row from column k on, or of a row of ones (s = 1, whose products are the sums of the weight's codes).
// is_ragged: the range may begin or end within these columns.
PREQUANT_DEVICE Piece load_codes(const uint8_t* row, bool is_one, int64_t k, CodeRange range, bool is_ragged) {
    Piece piece{{kMiddle, kMiddle, kMiddle, kMiddle}};
    if (k + kPieceCodes <= range.begin || k >= range.end) return piece;
    if (is_one)
        piece = {{kMiddle + kOnes, kMiddle + kOnes, kMiddle + kOnes, kMiddle + kOnes}};
    else
        piece = load<Piece>(row + k);
    if (is_ragged) {
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            const uint32_t mask = range_mask(k + 4 * w, range);
            piece.at[w] = (piece.at[w] & mask) | (kMiddle & ~mask);
        }
    }
    return piece;
}

// Where piece p of row m lies in shared memory, in pieces. Eight rows further on it is eight whole rows further.
PREQUANT_DEVICE int piece_place(int m, int p, int pieces_a_row) { return m * pieces_a_row + (p ^ (m & 7)); }

PREQUANT_DEVICE void store_signed(Piece* to, const Piece& codes) {
    Piece piece;
#pragma unroll
    for (int t = 0; t < 4; ++t)
        piece.at[t] = prmt(codes.at[t / 2], codes.at[2 + t / 2], t % 2 ? 0x7362u : 0x5140u) ^ kMiddle;
    store(to, piece);
}

// ---- weights ----

// A lane's codes of one chunk, as they lie in memory.
template <int kContainer>
struct LaneCodes {
    uint32_t words[kContainer];
};

// Marked as streaming: of all that a product reads, the weights are the last to be read again.
template <int kContainer>
PREQUANT_DEVICE LaneCodes<kContainer> load_lane(const uint8_t* chunk, int lane) {
    const uint8_t* const from = chunk + lane * lane_bytes(kContainer);
    LaneCodes<kContainer> codes;
    if constexpr (kContainer == 2) {
        const uint2 pair = __ldcs(reinterpret_cast<const uint2*>(from));
        codes.words[0] = pair.x, codes.words[1] = pair.y;
    } else {
#pragma unroll
        for (int i = 0; i < kContainer / 4; ++i) {
            const uint4 part = __ldcs(reinterpret_cast<const uint4*>(from) + i);
            codes.words[4 * i] = part.x, codes.words[4 * i + 1] = part.y;
            codes.words[4 * i + 2] = part.z, codes.words[4 * i + 3] = part.w;
        }
    }
    return codes;
}

// Tile j of a lane (16 columns) as bytes: rows g, and rows g + 8 times 2^kHighShift.
template <int kContainer>
PREQUANT_DEVICE void unpack_tile(const LaneCodes<kContainer>& codes, int j, uint32_t& low, uint32_t& high) {
    if constexpr (kContainer == 4) {
        // As asm, so that the compiler does not make them once more where the codes are added up.
        low = lop3<0xc0>(codes.words[j], 0x0f0f0f0fu, 0);
        high = lop3<0xc0>(codes.words[j], 0xf0f0f0f0u, 0);
    } else if constexpr (kContainer == 8) {
        low = prmt(codes.words[2 * j], codes.words[2 * j + 1], 0x6420u);
        high = prmt(codes.words[2 * j], codes.words[2 * j + 1], 0x7531u);
    } else {
        // A nibble of the tile's 16 bits holds the codes of both rows; one nibble a byte, then masks.
        const uint32_t twice = prmt(codes.words[j / 2], 0, j % 2 ? 0x3322u : 0x1100u);
        const uint32_t nibbles = (twice & 0x000f000fu) | ((twice >> 4) & 0x0f000f00u);
        low = nibbles & 0x03030303u;
        high = nibbles & 0x0c0c0c0cu;
    }
}

// A strip's 16 x 64 chunk as the A operands of two mma.
struct ChunkOperands {
    uint32_t halves[2][4];
};

template <int kContainer>
PREQUANT_DEVICE ChunkOperands unpack_chunk(const LaneCodes<kContainer>& codes) {
    ChunkOperands operands;
#pragma unroll
    for (int j = 0; j < 4; ++j)
        unpack_tile<kContainer>(codes, j, operands.halves[j / 2][j % 2 * 2], operands.halves[j / 2][j % 2 * 2 + 1]);
    return operands;
}

// sums[0] += the lane's codes of row g, sums[1] += those of row g + 8, times 2^kHighShift.
PREQUANT_DEVICE void add_codes(const ChunkOperands& operands, uint32_t (&sums)[2]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) sums[i % 2] = __dp4a(operands.halves[i / 4][i % 4], kOnes, sums[i % 2]);
}

// products (16 n x 8 m) += chunk x tokens; tokens: the four tiles of 8 rows of x, as ldmatrix_x4 gives them.
PREQUANT_DEVICE void multiply_chunk(const ChunkOperands& operands, const uint32_t (&tokens)[4],
                                    int32_t (&products)[4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const uint32_t pair[2] = {tokens[2 * half], tokens[2 * half + 1]};
        mma_m16n8k32_u8s8(products, operands.halves[half], pair);
    }
}

}  // namespace prequant::cuda
