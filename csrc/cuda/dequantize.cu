// dense[i, k] = (code - zero_point[b]) * scale[b] of row n = row_begin + i, b = block(n, k).          Meaning: reference.dequantize
//
//   row n, 4 bits, fp16 out     packed bytes  0 1 2 3 | 4 5 6 7 | ...     A thread makes one chunk: one 128-bit store (8 halves or
//                               thread           0    |    1    | ...     4 floats) from one load of 1 to 8 packed bytes.
//
// Requires   chunks of 16 bytes need K and the group to be multiples of the chunk, and aligned pointers; otherwise a chunk is one value.
//            Either way a chunk lies in one group: one scale, one zero point.
// Rounds     once, from float32.
// Limited by writing the dense matrix; the codes are at most a quarter of its bytes (half for 8-bit codes and 16-bit floats).
#include "cuda.h"
#include "portable.cuh"

namespace prequant::cuda {

namespace {

template <typename T, int kContainer, int kCodes>
__global__ void dequantize_kernel(Weight weight, int64_t group_size, int64_t row_begin, int64_t rows, T* __restrict__ dense) {
    constexpr int kBytes = kCodes * kContainer < 8 ? 1 : kCodes * kContainer / 8;
    const int64_t i = int64_t(blockIdx.x) * blockDim.y + threadIdx.y, n = row_begin + i;
    if (i >= rows) return;
    const int64_t first_block = (weight.scale_rows == 1 ? 0 : n) * weight.G;
    for (int64_t chunk = int64_t(blockIdx.y) * blockDim.x + threadIdx.x; chunk * kCodes < weight.K; chunk += int64_t(gridDim.y) * blockDim.x) {
        const int64_t k = chunk * kCodes;
        // One group costs no 64-bit division, which would outweigh the store.
        const int64_t block = first_block + (weight.G == 1 ? 0 : k / group_size);
        const int zero_point = weight.zero_point[block];
        const float scale = weight.scale[block];

        const auto packed = load<Vector<uint8_t, kBytes>>(weight.packed + n * packed_row_bytes(weight.K, kContainer) + k * kContainer / 8);
        const int64_t first = kCodes == 1 ? k % (8 / kContainer) : 0;  // a chunk of one code begins inside a byte
        Vector<T, kCodes> values;
#pragma unroll
        for (int j = 0; j < kCodes; ++j) values.at[j] = from_float<T>(static_cast<float>(code_at(packed.at, first + j, kContainer) - zero_point) * scale);
        store(dense + i * weight.K + k, values);
    }
}

template <typename T, int kCodes>
auto kernel_for(int container) {
    return container == 2 ? dequantize_kernel<T, 2, kCodes> : container == 4 ? dequantize_kernel<T, 4, kCodes> : dequantize_kernel<T, 8, kCodes>;
}

template <typename T>
void dequantize_to(const Weight& weight, int64_t row_begin, MutableMatrix dense, Stream stream) {
    constexpr int kCodes = kVectorBytes / sizeof(T);
    const int64_t group_size = weight.K / weight.G;
    T* to = static_cast<T*>(dense.data);
    if (group_size % kCodes == 0 && is_aligned(to, kVectorBytes) && is_aligned(weight.packed, packed_row_bytes(kCodes, weight.container))) {
        launch("dequantize_kernel", kernel_for<T, kCodes>(weight.container), row_grid(dense.rows, weight.K / kCodes, stream), weight, group_size, row_begin,
               dense.rows, to);
    } else {
        launch("dequantize_kernel", kernel_for<T, 1>(weight.container), row_grid(dense.rows, weight.K, stream), weight, group_size, row_begin, dense.rows, to);
    }
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
