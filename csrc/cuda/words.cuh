// A lane's codes of a tensor-core chunk (../formats.h) -> registers of mma operands.
//
//   code 8 j + 4 s + p,  p = 2 kk + nn      4 bits: word j   31 28      16 15      0     (word >> 4 p) & 0x000f000f  is
//   of the 16 x 16 tile j                                    p3 p2 p1 p0 | p3 p2 p1 p0   one register: the pair s = 0,
//                                                               s = 1        s = 0       s = 1.
//
//   register p     as it is               W (n, k) as B: registers p = nn, nn + 2 of the n8-tile nn; as A (n are the
//                                         rows): a0 .. a3
//                  after movmatrix.trans  W^T (k, n) as B: registers p = 2 kk, 2 kk + 1 of the n8-tile of columns
//                                         k = 8 kk .. 8 kk + 7
//
// A code becomes a float by or-ing it into the mantissa of a power of two: 0x6400 is 1024 in float16, whose lowest bits
// count ones, 0x4300 is 128 in bfloat16. The instruction that takes the power away subtracts the zero point too, so a
// code equal to it is exactly 0. In float16 the codes of odd p are or-ed in 4 bits higher, as 1024 + 16 code, and a
// multiplication by 1/16 brings them down: one shift a word.
//
//                        4 bits                    2 bits           8 bits
//   float16     a word   1 shift, 4 lop3, 4 math   + 6 to spread    2 prmt, 2 shifts, 4 lop3, 4 math
//   bfloat16             3 shifts, 4 lop3, 4 math  + 6              floats: 8 mantissa bits do not hold 128 + 255
//
// Exact: every value is an integer of at most 255, which both types hold.
#pragma once

#include <cstring>

#include "ptx.cuh"

namespace prequant::cuda {

template <typename To, typename From>
__device__ __forceinline__ To bits_as(const From& from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(static_cast<void*>(&to), static_cast<const void*>(&from), sizeof(To));
    return to;
}

template <typename T>
struct PairOf;
template <>
struct PairOf<__half> {
    using Type = __half2;
};
template <>
struct PairOf<__nv_bfloat16> {
    using Type = __nv_bfloat162;
};
template <typename T>
using Pair = typename PairOf<T>::Type;

template <typename T>
__device__ __forceinline__ uint32_t pair_of(float low, float high) {
    const T values[2] = {from_float<T>(low), from_float<T>(high)};
    return bits_as<uint32_t>(values);
}

template <typename T>
__device__ __forceinline__ uint32_t add_pairs(uint32_t a, uint32_t b) {
    return bits_as<uint32_t>(__hadd2(bits_as<Pair<T>>(a), bits_as<Pair<T>>(b)));
}

template <typename T>
__device__ __forceinline__ uint32_t multiply_pairs(uint32_t a, uint32_t b) {
    return bits_as<uint32_t>(__hmul2(bits_as<Pair<T>>(a), bits_as<Pair<T>>(b)));
}

template <typename T>
__device__ __forceinline__ uint32_t multiply_add_pairs(uint32_t a, uint32_t b, uint32_t c) {
    return bits_as<uint32_t>(__hfma2(bits_as<Pair<T>>(a), bits_as<Pair<T>>(b), bits_as<Pair<T>>(c)));
}

// (word & mask) | magic
__device__ __forceinline__ uint32_t masked_or(uint32_t word, uint32_t mask, uint32_t magic) {
    return lop3<(0xf0 & 0xcc) | 0xaa>(word, mask, magic);
}

// ---- a lane's 32 codes of a chunk ----

template <int kContainer>
struct LaneCodes {
    uint32_t words[kContainer];
};

// Where the 16-byte unit u of a chunk is kept in shared memory. At 8 bits a lane has two units: four lanes on, they
// trade places, so that eight lanes reading their first (or second) unit meet all banks.
template <int kContainer>
__device__ __forceinline__ constexpr int chunk_unit(int u) {
    return kContainer == 8 ? u ^ (u / 8 % 2) : u;
}

template <int kContainer>
__device__ __forceinline__ LaneCodes<kContainer> load_codes(const uint8_t* chunk, int lane) {
    if constexpr (kContainer == 8) {
        const auto low = load<Vector<uint32_t, 4>>(chunk + 16 * chunk_unit<8>(2 * lane)),
                   high = load<Vector<uint32_t, 4>>(chunk + 16 * chunk_unit<8>(2 * lane + 1));
        return {low.at[0], low.at[1], low.at[2], low.at[3], high.at[0], high.at[1], high.at[2], high.at[3]};
    } else {
        const auto words = load<Vector<uint32_t, kContainer>>(chunk + 4 * kContainer * lane);
        return bits_as<LaneCodes<kContainer>>(words);
    }
}

// ---- a 16 x 16 tile: its eight codes ----
//
// The four codes of one s are in each half of a word (8 bits: two words, p = 0, 1 and p = 2, 3).

template <int kContainer>
struct TileCodes {
    uint32_t words[kContainer == 8 ? 2 : 1];
};

template <int kContainer>
__device__ __forceinline__ TileCodes<kContainer> tile_codes(const LaneCodes<kContainer>& codes, int j) {
    if constexpr (kContainer == 8) {
        return {prmt(codes.words[2 * j], codes.words[2 * j + 1], 0x5410),
                prmt(codes.words[2 * j], codes.words[2 * j + 1], 0x7632)};
    } else if constexpr (kContainer == 4) {
        return {codes.words[j]};
    } else {
        // 8 codes of 2 bits, spread to 4 bits each.
        uint32_t word = codes.words[j / 2] >> (16 * (j % 2)) & 0xffff;
        word = (word | word << 8) & 0x00ff00ff;
        word = (word | word << 4) & 0x0f0f0f0f;
        return {(word | word << 2) & 0x33333333};
    }
}

template <int kContainer>
__device__ __forceinline__ TileCodes<kContainer> transposed(TileCodes<kContainer> tile) {
    tile.words[0] = movmatrix_trans(tile.words[0]);
    if constexpr (kContainer == 8) tile.words[1] = movmatrix_trans(tile.words[1]);
    return tile;
}

// ---- zero points ----

// What turns or-ed codes into code - zero point: of the registers of even p (nn = 0) and of odd p (nn = 1).
struct ZeroPoints {
    uint32_t of[2];
};

// From two zero points each, that of the pair's first code in the lower 16 bits.
template <typename T, int kContainer>
__device__ __forceinline__ ZeroPoints zero_points(uint32_t even, uint32_t odd) {
    if constexpr (std::is_same_v<T, __half>) {
        // -(1024 + z); odd p at 4 bits: -(64 + z), where a step of the mantissa is 1/16.
        return {0xe400e400u + even, kContainer == 8 ? 0xe400e400u + odd : 0xd400d400u + (odd << 4)};
    } else {
        if constexpr (kContainer == 8) return {even, odd};  // registers_of makes floats of them
        return {0xc300c300u + even, 0xc300c300u + odd};  // -(128 + z)
    }
}

// ---- the four registers p = 0 .. 3 of a tile ----

struct Registers {
    uint32_t at[4];
};

template <typename T, int kContainer>
__device__ __forceinline__ Registers registers_of(const TileCodes<kContainer>& tile, const ZeroPoints& zero) {
    Registers out;
    if constexpr (std::is_same_v<T, __half> && kContainer == 8) {
#pragma unroll
        for (int p = 0; p < 4; ++p)
            out.at[p] =
                add_pairs<T>(masked_or(tile.words[p / 2] >> (8 * (p % 2)), 0x00ff00ffu, 0x64006400u), zero.of[p % 2]);
    } else if constexpr (std::is_same_v<T, __half>) {
        constexpr uint32_t kSixteenth = 0x2c002c00u;
#pragma unroll
        for (int p = 0; p < 4; p += 2) {
            const uint32_t word = tile.words[0] >> (4 * p);
            out.at[p] = add_pairs<T>(masked_or(word, 0x000f000fu, 0x64006400u), zero.of[0]);
            out.at[p + 1] = multiply_add_pairs<T>(masked_or(word, 0x00f000f0u, 0x64006400u), kSixteenth, zero.of[1]);
        }
    } else if constexpr (kContainer == 8) {
#pragma unroll
        for (int p = 0; p < 4; ++p) {
            const uint32_t word = tile.words[p / 2], pair = zero.of[p % 2];
            const float low = __uint_as_float(prmt(word, kCodeBiasBits, 0x7550 | p % 2)) -
                              (kCodeBias + static_cast<float>(pair & 0xffff));
            const float high = __uint_as_float(prmt(word, kCodeBiasBits, 0x7552 | p % 2)) -
                               (kCodeBias + static_cast<float>(pair >> 16));
            out.at[p] = pair_of<T>(low, high);
        }
    } else {
#pragma unroll
        for (int p = 0; p < 4; ++p)
            out.at[p] = add_pairs<T>(masked_or(tile.words[0] >> (4 * p), 0x000f000fu, 0x43004300u), zero.of[p % 2]);
    }
    return out;
}

}  // namespace prequant::cuda
