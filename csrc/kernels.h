// The contract: one function an operator, raw pointers and plain structs, the same for every device. No tensors below
// this line.
//
// Meaning, shapes and rounding are those of the function of the same name in prequant_ext/reference.py. Every matrix is
// row-major and contiguous; every check has been made by the operator's host function (ops_*.cpp). A device fills a
// table; a null entry is an operator it does not have, and calling that operator says so.
#pragma once

#include <cstdint>

#include "formats.h"

namespace prequant {

// What every device computes with, so that all of them make the same bits.
constexpr int64_t kStatsTile = 4096;  // weight_stats: weights of a tile; a block's tiles are merged in index order
constexpr double kEnergyUnits = 0x1p20;  // outlier_counts: energy is counted in units of std^2 / 2^20
constexpr float kMinScale = 0x1p-126f;  // quantize_activations: the smallest normal float32
constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds |x| below 2^22 half to even
constexpr uint32_t kNanBits = 0x7fc00000;  // of the float32 NaN that a result is where its input has no number

// Of sums of terms that are not negative.
PREQUANT_HOST_DEVICE constexpr int64_t saturating_add(int64_t a, int64_t b) {
    const uint64_t sum = static_cast<uint64_t>(a) + static_cast<uint64_t>(b);  // neither is negative: no carry is lost
    return static_cast<int64_t>(sum > uint64_t{INT64_MAX} ? uint64_t{INT64_MAX} : sum);
}

enum class Dtype : int { float32, float16, bfloat16 };

struct Matrix {  // (rows, cols) floats
    const void* data;
    Dtype dtype;
    int64_t rows, cols;
};

struct MutableMatrix {
    void* data;
    Dtype dtype;
    int64_t rows, cols;
};

// Frozen codes with their scales. Weight (n, k) is (code - zero_point[b]) * scale[b], b = block(n, k).
struct Weight {
    const uint8_t* packed;  // canonical rows, or the device's own layout where is_prepacked
    const float* scale;
    const uint8_t* zero_point;
    int64_t N, K;
    int64_t scale_rows, G;  // (1, 1) per tensor, (N, 1) per row, (N, G) per group of K / G
    int container;
    bool is_prepacked = false;

    PREQUANT_HOST_DEVICE int64_t block(int64_t n, int64_t k) const {
        return (scale_rows == 1 ? 0 : n) * G + (G == 1 ? 0 : k / (K / G));
    }
    PREQUANT_HOST_DEVICE const uint8_t* row(int64_t n) const { return packed + n * packed_row_bytes(K, container); }
};

// The trained part: values (N, r) of input columns (axis 1) or (r, K) of output rows (axis 0).
struct Outliers {
    const int64_t* dims;
    const float* values;
    int64_t r;
    int axis;
};

// 8-bit activations: x(m, k) is (codes[m, k] - zero_point[t]) * scale[t], t = m where per_token and 0 otherwise.
struct Activations {
    const uint8_t* codes;
    const float* scale;
    const uint8_t* zero_point;
    const int32_t* sums;  // (M, G) sums of the codes of each group; null where the operator has no use for them
    int64_t M, K;
    bool per_token;
};

// Where a kernel runs, and the scratch memory that it may ask for. Empty on the CPU, whose kernels have their own
// buffers.
struct Stream {
    void* handle = nullptr;  // the current cudaStream_t
    void* (*allocate)(void* owner, int64_t bytes) = nullptr;
    void* owner = nullptr;

    // From torch's caching allocator, 256-byte aligned, uninitialized; it may be handed out again once the operator has
    // returned, in stream order.
    void* scratch(int64_t bytes) const { return bytes == 0 ? nullptr : allocate(owner, bytes); }
};

struct Kernels {
    // Whether linear_w4a16, linear_w4a8 and linear_dx read prepacked weights, and scale_grad; every other kernel but
    // dequantize reads canonical rows. Operators convert.
    bool linear_reads_prepacked;
    bool scale_grad_reads_prepacked;
    // Whether linear_w4a16, or linear_dx, of M tokens is better made by dequantizing the weight once and calling
    // torch's matrix product; null: never.
    bool (*prefers_dense)(int64_t M, const Weight& weight, Dtype dtype, bool is_backward);

    void (*weight_stats)(Matrix weight, int64_t block_size, double* mean, double* std, double* minimum, double* maximum,
                         Stream);
    void (*outlier_counts)(Matrix weight, const double* mean, const double* std, double threshold,
                           int64_t* column_counts, int64_t* column_energy, int64_t* row_counts, int64_t* row_energy,
                           Stream);
    void (*select_outlier_dims)(const int64_t* counts, const int64_t* energy, int64_t size, int64_t r, int64_t* dims,
                                Stream);

    void (*quantize_pack)(Matrix weight, const float* scale, const uint8_t* zero_point, int64_t scale_rows, int64_t G,
                          int bits, const int64_t* outlier_dims, int64_t r, int axis, uint8_t* packed, Stream);
    void (*pack)(const uint8_t* codes, int64_t N, int64_t K, int container, uint8_t* packed, Stream);
    void (*unpack)(const uint8_t* packed, int64_t N, int64_t K, int container, uint8_t* codes, Stream);
    void (*prepack)(const uint8_t* packed, int64_t N, int64_t K, int container, uint8_t* prepacked, Stream);
    void (*unprepack)(const uint8_t* prepacked, int64_t N, int64_t K, int container, uint8_t* packed, Stream);
    // dense.rows rows of the weight, from row_begin on.
    void (*dequantize)(Weight weight, int64_t row_begin, MutableMatrix dense, Stream);
    void (*scatter_outlier_)(MutableMatrix dense, Outliers outliers, bool accumulate, Stream);

    // excluded: null, or `size` columns left out of the ranges
    void (*quantize_activations)(Matrix x, bool per_token, int64_t G, const int64_t* excluded, int64_t size,
                                 uint8_t* codes, float* scale, uint8_t* zero_point, int32_t* sums, Stream);
    // ids that are not 0 ... V - 1, the rows of the table, make rows of NaN; on the CPU the host function refuses them
    void (*embedding)(const int64_t* ids, const uint8_t* codes, const float* scale, const uint8_t* zero_point,
                      int64_t V, bool per_row, MutableMatrix rows, Stream);

    // raw: null, or the float activations whose outlier columns are multiplied as they are; bias: null or (N)
    // in_float32: float32 inputs are multiplied as they are; otherwise a kernel may round them to int16 blocks
    // (cpu/block_rows.h states the error)
    void (*linear_w4a16)(Matrix x, Weight weight, Outliers outliers, const float* bias, bool in_float32,
                         MutableMatrix y, Stream);
    void (*linear_w4a8)(Activations x, const Matrix* raw, Weight weight, Outliers outliers, const float* bias,
                        MutableMatrix y, Stream);
    void (*linear_dx)(Matrix grad_y, Weight weight, Outliers outliers, bool in_float32, MutableMatrix grad_x, Stream);

    // Either x (float) or codes is given: the other one's data is null.
    void (*outlier_grad)(Matrix grad_y, Matrix x, Activations codes, const int64_t* dims, int64_t r, int axis,
                         float* gradient, Stream);
    // weight.scale is null: the gradient does not need it.
    void (*scale_grad)(Matrix grad_y, Matrix x, Activations codes, Weight weight, float* gradient, Stream);
};

const Kernels& cpu_kernels();  // of the instruction-set level in use, cpu/isa/level.h
#ifdef PREQUANT_CUDA
const Kernels& cuda_kernels();
#endif

}  // namespace prequant
