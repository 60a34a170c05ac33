// (N, K) uint8 codes <-> canonical storage.                                   Meaning: reference.pack, reference.unpack
//
//   codes of row n     0  1  2 ... 15 | 16 17 ... 31 | ...     A thread moves one vector: 16 codes, one 128-bit access,
//   packed (4 bits)   10 32 ...    FE |  ...         | ...     against 4, 8 or 16 bytes of packed storage, one access
//                                                              too.
//
// Requires   codes below 2^container. Vectors of 16 need K % 16 == 0 and aligned pointers; otherwise a thread moves one
//            packed byte.
// Limited by reading and writing each byte once.
#include "cuda.h"
#include "portable.cuh"

namespace prequant::cuda {

namespace {

// The two widths of a vector, in codes: a 128-bit access, or the codes of one packed byte.
template <int kContainer, bool kWide>
struct Width {
    static constexpr int kPerByte = 8 / kContainer, kCodes = kWide ? kVectorBytes : kPerByte,
                         kBytes = kCodes / kPerByte;
    using Codes = Vector<uint8_t, kCodes>;
    using Packed = Vector<uint8_t, kBytes>;
};

template <int kContainer, bool kWide>
__global__ void pack_kernel(const uint8_t* __restrict__ codes, int64_t N, int64_t K, uint8_t* __restrict__ packed) {
    using C = Width<kContainer, kWide>;
    const int64_t n = int64_t(blockIdx.x) * blockDim.y + threadIdx.y, row_bytes = packed_row_bytes(K, kContainer);
    if (n >= N) return;
    for (int64_t vector = int64_t(blockIdx.y) * blockDim.x + threadIdx.x; vector * C::kBytes < row_bytes;
         vector += int64_t(gridDim.y) * blockDim.x) {
        const uint8_t* from = codes + n * K + vector * C::kCodes;
        typename C::Codes in;
        if constexpr (kWide) {
            in = load<typename C::Codes>(from);
        } else {
            // Padding bits are 0.
            for (int i = 0; i < C::kCodes; ++i) in.at[i] = vector * C::kCodes + i < K ? from[i] : 0;
        }
        typename C::Packed out;
#pragma unroll
        for (int byte = 0; byte < C::kBytes; ++byte) {
            int bits = 0;
            for (int i = 0; i < C::kPerByte; ++i) bits |= in.at[byte * C::kPerByte + i] << (i * kContainer);
            out.at[byte] = static_cast<uint8_t>(bits);
        }
        store(packed + n * row_bytes + vector * C::kBytes, out);
    }
}

template <int kContainer, bool kWide>
__global__ void unpack_kernel(const uint8_t* __restrict__ packed, int64_t N, int64_t K, uint8_t* __restrict__ codes) {
    using C = Width<kContainer, kWide>;
    const int64_t n = int64_t(blockIdx.x) * blockDim.y + threadIdx.y, row_bytes = packed_row_bytes(K, kContainer);
    if (n >= N) return;
    for (int64_t vector = int64_t(blockIdx.y) * blockDim.x + threadIdx.x; vector * C::kBytes < row_bytes;
         vector += int64_t(gridDim.y) * blockDim.x) {
        const auto in = load<typename C::Packed>(packed + n * row_bytes + vector * C::kBytes);
        uint8_t* to = codes + n * K + vector * C::kCodes;
        typename C::Codes out;
#pragma unroll
        for (int i = 0; i < C::kCodes; ++i) out.at[i] = static_cast<uint8_t>(code_at(in.at, i, kContainer));
        if constexpr (kWide) {
            store(to, out);
        } else {
            for (int i = 0; i < C::kCodes && vector * C::kCodes + i < K; ++i) to[i] = out.at[i];
        }
    }
}

template <bool kWide>
auto pack_kernel_for(int container) {
    return container == 2 ? pack_kernel<2, kWide> : container == 4 ? pack_kernel<4, kWide> : pack_kernel<8, kWide>;
}

template <bool kWide>
auto unpack_kernel_for(int container) {
    return container == 2   ? unpack_kernel<2, kWide>
           : container == 4 ? unpack_kernel<4, kWide>
                            : unpack_kernel<8, kWide>;
}

bool fits_wide(const uint8_t* codes, const uint8_t* packed, int64_t K, int container) {
    return K % kVectorBytes == 0 && is_aligned(codes, kVectorBytes) &&
           is_aligned(packed, packed_row_bytes(kVectorBytes, container));
}

}  // namespace

void pack(const uint8_t* codes, int64_t N, int64_t K, int container, uint8_t* packed, Stream stream) {
    if (N == 0 || K == 0) return;
    if (fits_wide(codes, packed, K, container)) {
        launch("pack_kernel", pack_kernel_for<true>(container), row_grid(N, K / kVectorBytes, stream), codes, N, K,
               packed);
    } else {
        launch("pack_kernel", pack_kernel_for<false>(container), row_grid(N, packed_row_bytes(K, container), stream),
               codes, N, K, packed);
    }
}

void unpack(const uint8_t* packed, int64_t N, int64_t K, int container, uint8_t* codes, Stream stream) {
    if (N == 0 || K == 0) return;
    if (fits_wide(codes, packed, K, container)) {
        launch("unpack_kernel", unpack_kernel_for<true>(container), row_grid(N, K / kVectorBytes, stream), packed, N, K,
               codes);
    } else {
        launch("unpack_kernel", unpack_kernel_for<false>(container),
               row_grid(N, packed_row_bytes(K, container), stream), packed, N, K, codes);
    }
}

}  // namespace prequant::cuda
