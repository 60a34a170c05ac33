// code = clip(rint(w / scale) + zero_point, 0, 2^bits - 1), packed; outlier dimensions get zero_point, worth exactly 0.
//                                                                                      Meaning: reference.quantize_pack
//   row n, fp16 in, 4 bits    weights  0 ... 7 | 8 ... 15 | ...     A thread makes one vector: one 128-bit load
//                             packed   0 ... 3 | 4 ...  7 | ...     (8 halves or 4 floats), one store of 1 to 8 bytes.
//                             thread      0    |    1     | ...
//   marks                     bit d of a bitmap in scratch: dimension d is an outlier. A first kernel makes it.
//
// Requires   a finite w, a scale of at least 2^-126. Vectors of 16 bytes need K and the group to be multiples of the
//            vector, and aligned pointers; otherwise a thread makes one packed byte. Outlier dimensions beyond the
//            matrix are passed over.
// Rounds     a true float32 division, then half to even: every device makes the same bytes.
// Limited by one read of the weight.
#include <cmath>

#include "cuda.h"
#include "portable.cuh"

namespace prequant::cuda {

namespace {

constexpr int kMarkBits = 32, kMarkThreads = 1024;

// One block, because it must clear all marks before it sets one.
__global__ void __launch_bounds__(kMarkThreads)
    mark_outliers_kernel(const int64_t* __restrict__ dims, int64_t r, int64_t length, unsigned* marks) {
    for (int64_t i = threadIdx.x; i * kMarkBits < length; i += kMarkThreads) marks[i] = 0;
    __syncthreads();
    for (int64_t j = threadIdx.x; j < r; j += kMarkThreads) {
        const int64_t d = dims[j];
        if (d >= 0 && d < length) atomicOr(&marks[d / kMarkBits], 1u << (d % kMarkBits));
    }
}

struct Blocks {  // scale and zero point, as Weight has them
    const float* scale;
    const uint8_t* zero_point;
    int64_t scale_rows, G, group_size;
};

// Half to even by an addition that leaves no bits behind the point; the sum's low bits are the integer. Clipped first:
// far beyond every code, within reach of the addition. NaN becomes the top code, as on the CPU.
__device__ __forceinline__ int code_of(float weight, float scale, int zero_point, int top) {
    const float ratio = fmaxf(fminf(__fdiv_rn(weight, scale), 1024.0f), -1024.0f);
    const int code = __float_as_int(__fadd_rn(ratio, kRounder)) - __float_as_int(kRounder) + zero_point;
    return min(max(code, 0), top);
}

template <typename T, int kContainer, bool kWide>
__global__ void quantize_pack_kernel(const T* __restrict__ weight, int64_t N, int64_t K, Blocks blocks, int top,
                                     const unsigned* __restrict__ marks, int axis, uint8_t* __restrict__ packed) {
    constexpr int kPerByte = 8 / kContainer, kCodes = kWide ? kVectorBytes / sizeof(T) : kPerByte,
                  kBytes = kCodes / kPerByte;
    const int64_t n = int64_t(blockIdx.x) * blockDim.y + threadIdx.y, row_bytes = packed_row_bytes(K, kContainer);
    if (n >= N) return;
    const bool is_outlier_row = marks != nullptr && axis == 0 && (marks[n / kMarkBits] >> (n % kMarkBits) & 1);
    const int64_t first_block = (blocks.scale_rows == 1 ? 0 : n) * blocks.G;
#pragma unroll 1  // a thread has one vector, but in very long rows
    for (int64_t vector = int64_t(blockIdx.y) * blockDim.x + threadIdx.x; vector * kBytes < row_bytes;
         vector += int64_t(gridDim.y) * blockDim.x) {
        const int64_t k = vector * kCodes;
        Vector<T, kCodes> values;
        if constexpr (kWide) {
            values = load<Vector<T, kCodes>>(weight + n * K + k);
        } else {
            for (int i = 0; i < kCodes; ++i) values.at[i] = weight[n * K + (k + i < K ? k + i : k)];
        }
        // A vector lies inside one word of marks: its length divides 32.
        unsigned is_outlier = is_outlier_row ? ~0u : 0;
        if (marks != nullptr && axis == 1) is_outlier = marks[k / kMarkBits] >> (k % kMarkBits);

        int64_t block = 0;
        float scale = 1;
        int zero_point = 0;
        uint8_t codes[kCodes];
#pragma unroll
        for (int i = 0; i < kCodes; ++i) {
            if (!kWide || i == 0) {  // a wide vector lies in one group; one group costs no 64-bit division
                block = first_block + (blocks.G == 1 ? 0 : (k + i) / blocks.group_size);
                if (kWide || k + i < K) scale = blocks.scale[block], zero_point = blocks.zero_point[block];
            }
            const int code = code_of(to_float(values.at[i]), scale, zero_point, top);
            const bool is_padding = !kWide && k + i >= K;
            codes[i] = static_cast<uint8_t>(is_padding ? 0 : is_outlier >> i & 1 ? zero_point : code);
        }
        Vector<uint8_t, kBytes> out;
#pragma unroll
        for (int byte = 0; byte < kBytes; ++byte) {
            int bits = 0;
            for (int i = 0; i < kPerByte; ++i) bits |= codes[byte * kPerByte + i] << (i * kContainer);
            out.at[byte] = static_cast<uint8_t>(bits);
        }
        store(packed + n * row_bytes + vector * kBytes, out);
    }
}

template <typename T, bool kWide>
auto kernel_for(int container) {
    return container == 2   ? quantize_pack_kernel<T, 2, kWide>
           : container == 4 ? quantize_pack_kernel<T, 4, kWide>
                            : quantize_pack_kernel<T, 8, kWide>;
}

template <typename T>
void quantize_pack_from(Matrix weight, const Blocks& blocks, int bits, const unsigned* marks, int axis, uint8_t* packed,
                        Stream stream) {
    constexpr int64_t kCodes = kVectorBytes / sizeof(T);
    const int64_t N = weight.rows, K = weight.cols;
    const int container = container_bits(bits), top = (1 << bits) - 1;
    const bool is_wide = blocks.group_size % kCodes == 0 && is_aligned(weight.data, kVectorBytes) &&
                         is_aligned(packed, packed_row_bytes(kCodes, container));
    const LaunchConfig config = row_grid(N, is_wide ? K / kCodes : packed_row_bytes(K, container), stream);
    launch("quantize_pack_kernel", is_wide ? kernel_for<T, true>(container) : kernel_for<T, false>(container), config,
           static_cast<const T*>(weight.data), N, K, blocks, top, marks, axis, packed);
}

}  // namespace

void quantize_pack(Matrix weight, const float* scale, const uint8_t* zero_point, int64_t scale_rows, int64_t G,
                   int bits, const int64_t* outlier_dims, int64_t r, int axis, uint8_t* packed, Stream stream) {
    if (weight.rows == 0 || weight.cols == 0) return;
    unsigned* marks = nullptr;
    if (r > 0) {
        const int64_t length = axis == 0 ? weight.rows : weight.cols;
        marks = static_cast<unsigned*>(
            stream.scratch(ceil_div(length, kMarkBits) * static_cast<int64_t>(sizeof(unsigned))));
        launch("mark_outliers_kernel", mark_outliers_kernel,
               {.grid = dim3(1), .block = dim3(kMarkThreads), .stream = stream}, outlier_dims, r, length, marks);
    }
    const Blocks blocks{scale, zero_point, scale_rows, G, weight.cols / G};
    switch (weight.dtype) {
        case Dtype::float32: return quantize_pack_from<float>(weight, blocks, bits, marks, axis, packed, stream);
        case Dtype::float16: return quantize_pack_from<__half>(weight, blocks, bits, marks, axis, packed, stream);
        case Dtype::bfloat16:
            return quantize_pack_from<__nv_bfloat16>(weight, blocks, bits, marks, axis, packed, stream);
    }
}

}  // namespace prequant::cuda
