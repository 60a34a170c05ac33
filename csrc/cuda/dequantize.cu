// dense[i, k] = (code - zero_point[b]) * scale[b] of row n = row_begin + i, b = block(n, k).
//                                                                                        Meaning: reference.dequantize
//   canonical row n, 4 bits, fp16 out   packed bytes  0 1 2 3 | 4 5 6 7 | ...   A thread makes one 128-bit store
//                                       thread           0    |    1    | ...   (8 halves or 4 floats) from one load of
//                                                                               1 to 8 packed bytes.
//
//   tensor-core chunk (formats.h)       lane 4g + t has columns 8u + 2t and 8u + 2t + 1 of rows g and g + 8. A warp
//                                       makes a chunk: its codes go to shared memory, a byte each, and come back row
//                                       after row, so that a store is 128 bits of a lane and whole rows of the chunk.
//
//       unit of 8 codes                 0   1   2   3   4   5   6   7            Row n keeps unit u at u ^ (n % 8), so
//       row 0                           0   1   2   3   4   5   6   7            that neither the pairs of 8 rows, nor
//       row 1                           1   0   3   2   5   4   7   6            the units of a row, meet in a bank.
//
// Requires   128-bit stores need the group to be a multiple of their values (without groups: K), and aligned pointers;
//            otherwise a thread makes one value at a time. Either way its values lie in one group: one scale, one zero
//            point. Chunks are aligned.
// Rounds     once, from float32.
// Limited by writing the dense matrix; the codes are at most a quarter of its bytes (half for 8-bit codes and 16-bit
//            floats).
#include "cuda.h"
#include "portable.cuh"

namespace prequant::cuda {

namespace {

// ---- canonical rows ----

template <typename T, int kContainer, int kCodes>
__global__ void dequantize_kernel(Weight weight, int64_t group_size, int64_t row_begin, int64_t rows,
                                  T* __restrict__ dense) {
    constexpr int kBytes = kCodes * kContainer < 8 ? 1 : kCodes * kContainer / 8;
    const int64_t i = int64_t(blockIdx.x) * blockDim.y + threadIdx.y, n = row_begin + i;
    if (i >= rows) return;
    const int64_t first_block = (weight.scale_rows == 1 ? 0 : n) * weight.G;
    for (int64_t vector = int64_t(blockIdx.y) * blockDim.x + threadIdx.x; vector * kCodes < weight.K;
         vector += int64_t(gridDim.y) * blockDim.x) {
        const int64_t k = vector * kCodes;
        // One group costs no 64-bit division, which would outweigh the store.
        const int64_t block = first_block + (weight.G == 1 ? 0 : k / group_size);
        const int zero_point = weight.zero_point[block];
        const float scale = weight.scale[block];

        const auto packed = load<Vector<uint8_t, kBytes>>(weight.packed + n * packed_row_bytes(weight.K, kContainer) +
                                                          k * kContainer / 8);
        const int64_t first = kCodes == 1 ? k % (8 / kContainer) : 0;  // a vector of one code begins inside a byte
        Vector<T, kCodes> values;
#pragma unroll
        for (int j = 0; j < kCodes; ++j)
            values.at[j] =
                from_float<T>(static_cast<float>(code_at(packed.at, first + j, kContainer) - zero_point) * scale);
        store(dense + i * weight.K + k, values);
    }
}

template <typename T, int kCodes>
auto kernel_for(int container) {
    return container == 2   ? dequantize_kernel<T, 2, kCodes>
           : container == 4 ? dequantize_kernel<T, 4, kCodes>
                            : dequantize_kernel<T, 8, kCodes>;
}

template <typename T>
void dequantize_rows(const Weight& weight, int64_t row_begin, MutableMatrix dense, Stream stream) {
    constexpr int kCodes = kVectorBytes / sizeof(T);
    const int64_t group_size = weight.K / weight.G;
    T* to = static_cast<T*>(dense.data);
    if (group_size % kCodes == 0 && is_aligned(to, kVectorBytes) &&
        is_aligned(weight.packed, packed_row_bytes(kCodes, weight.container))) {
        launch("dequantize_kernel", kernel_for<T, kCodes>(weight.container),
               row_grid(dense.rows, weight.K / kCodes, stream), weight, group_size, row_begin, dense.rows, to);
    } else {
        launch("dequantize_kernel", kernel_for<T, 1>(weight.container), row_grid(dense.rows, weight.K, stream), weight,
               group_size, row_begin, dense.rows, to);
    }
}

// ---- tensor-core chunks ----

constexpr int kWarps = 8;  // of a block, at most
constexpr int kUnit = 8;  // bytes of a tile that are never parted

// 2^23 + code is a float with the code in its lowest bits: no conversion, and both differences are exact.
template <typename T, int kCodes>
__device__ inline Vector<T, kCodes> dequantized(Vector<uint8_t, kCodes> codes, float biased_zero, float scale) {
    Vector<T, kCodes> values;
#pragma unroll
    for (int j = 0; j < kCodes; ++j)
        values.at[j] = from_float<T>((__uint_as_float(kCodeBiasBits | codes.at[j]) - biased_zero) * scale);
    return values;
}

// Two blocks a multiprocessor are asked for: left to itself, ptxas keeps to 64 registers and spills.
template <typename T, int kContainer, int kCodes>
__global__ void __launch_bounds__(kWarps* kWarp, 2)
    dequantize_chunks_kernel(Weight weight, int group_size, int64_t row_begin, int64_t rows, T* __restrict__ dense) {
    constexpr int kLoadWords = kContainer < 4 ? kContainer : 4, kCodesPerWord = 32 / kContainer;
    constexpr int kRows = kChunkRows, kColumns = kChunkColumns, kVectors = kColumns / kCodes;
    // Of the lanes, as they store vectors.
    constexpr int kAcross = kVectors < kWarp ? kVectors : kWarp, kDown = kWarp / kAcross;
    PREQUANT_SHARED(tiles, Vector<uint8_t, kUnit>[kWarps][kRows][kColumns / kUnit]);
    auto& tile = tiles[(threadIdx.y * blockDim.x + threadIdx.x) / kWarp];
    const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    const int64_t strip = row_begin / kRows + int64_t(blockIdx.x) * blockDim.y + threadIdx.y, end = row_begin + rows;
    const int64_t row_blocks = weight.scale_rows == 1 ? 0 : weight.G;
    const int chunks = static_cast<int>(chunks_along(weight.K)), row_vectors = static_cast<int>(weight.K) / kCodes;
    auto* to = reinterpret_cast<Vector<T, kCodes>*>(dense);
    if (strip * kRows >= end) return;  // the whole warp

    for (int at = blockIdx.y * blockDim.x + threadIdx.x; at < chunks * kWarp; at += gridDim.y * blockDim.x) {
        const int chunk = at / kWarp;
        const uint8_t* from =
            weight.packed + (strip * chunks + chunk) * chunk_bytes(kContainer) + lane * lane_bytes(kContainer);
        uint32_t words[kContainer];  // 32 codes
#pragma unroll
        for (int w = 0; w < kContainer; w += kLoadWords) {
            const auto loaded = load<Vector<uint32_t, kLoadWords>>(from + 4 * w);
#pragma unroll
            for (int i = 0; i < kLoadWords; ++i) words[w + i] = loaded.at[i];
        }
        const auto code = [&](int n, int k) {  // of lane 0; the other lanes have theirs in the same places
            const int i = chunk_code(n, k);
            return words[i / kCodesPerWord] >> (i % kCodesPerWord * kContainer) & ((1u << kContainer) - 1);
        };
        __syncwarp();  // the tile of the chunk before has been read
#pragma unroll
        for (int nn = 0; nn < 2; ++nn)
#pragma unroll
            for (int u = 0; u < kColumns / kUnit; ++u)
                store(tile[g + 8 * nn][u ^ g].at + 2 * t,
                      static_cast<uint16_t>(code(8 * nn, 8 * u) | code(8 * nn, 8 * u + 1) << 8));
        __syncwarp();
        for (int vector = lane % kAcross; vector < kVectors; vector += kAcross) {
            const int across = chunk * kVectors + vector, group = weight.G == 1 ? 0 : across * kCodes / group_size;
            if (across >= row_vectors) break;
#pragma unroll(kCodes == 1 ? 1 : kCodes / 2)
            for (int top = 0; top < kRows; top += kDown) {
                const int row = top + lane / kAcross;
                const int64_t n = strip * kRows + row, block = n * row_blocks + group;
                if (n < row_begin || n >= end) continue;
                const float biased_zero = kCodeBias + static_cast<float>(weight.zero_point[block]),
                            scale = weight.scale[block];
                const auto codes = load<Vector<uint8_t, kCodes>>(tile[row][vector * kCodes / kUnit ^ row % 8].at +
                                                                 vector * kCodes % kUnit);
                store(to + (n - row_begin) * row_vectors + across, dequantized<T, kCodes>(codes, biased_zero, scale));
            }
        }
    }
}

template <typename T, int kCodes>
auto chunks_kernel_for(int container) {
    return container == 2   ? dequantize_chunks_kernel<T, 2, kCodes>
           : container == 4 ? dequantize_chunks_kernel<T, 4, kCodes>
                            : dequantize_chunks_kernel<T, 8, kCodes>;
}

template <typename T>
void dequantize_chunks(const Weight& weight, int64_t row_begin, MutableMatrix dense, Stream stream) {
    constexpr int kCodes = kVectorBytes / sizeof(T);
    const int64_t group_size = weight.K / weight.G,
                  strips = ceil_div(row_begin + dense.rows, kChunkRows) - row_begin / kChunkRows;
    constexpr int64_t kMaxColumns = INT32_MAX - kChunkColumns;  // the kernel counts columns in 32 bits
    if (weight.K > kMaxColumns)
        throw std::runtime_error("dequantize: a prepacked weight has at most " + std::to_string(kMaxColumns) +
                                 " columns, got " + std::to_string(weight.K));
    T* to = static_cast<T*>(dense.data);
    const bool is_wide = group_size % kCodes == 0 && is_aligned(to, kVectorBytes);
    launch("dequantize_chunks_kernel",
           is_wide ? chunks_kernel_for<T, kCodes>(weight.container) : chunks_kernel_for<T, 1>(weight.container),
           row_grid(strips, chunks_along(weight.K) * kWarp, stream), weight, static_cast<int>(group_size), row_begin,
           dense.rows, to);
}

template <typename T>
void dequantize_to(const Weight& weight, int64_t row_begin, MutableMatrix dense, Stream stream) {
    (weight.is_prepacked ? dequantize_chunks<T> : dequantize_rows<T>)(weight, row_begin, dense, stream);
}

}  // namespace

void dequantize(Weight weight, int64_t row_begin, MutableMatrix dense, Stream stream) {
    if (dense.rows == 0 || weight.K == 0) return;
    switch (dense.dtype) {
        case Dtype::float32: return dequantize_to<float>(weight, row_begin, dense, stream);
        case Dtype::float16: return dequantize_to<__half>(weight, row_begin, dense, stream);
        case Dtype::bfloat16: return dequantize_to<__nv_bfloat16>(weight, row_begin, dense, stream);
    }
}

}  // namespace prequant::cuda
