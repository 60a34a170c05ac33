// The checks that operators share. A message names the argument, what was wanted and what came.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>

#include "kernels.h"

namespace prequant {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_of(const Tensor& tensor) {
    std::string text = "(";
    for (int64_t i = 0; i < tensor.dim(); ++i) text += (i ? ", " : "") + std::to_string(tensor.size(i));
    return text + ")";
}

inline const char* dtype_name(ScalarType dtype) {
    switch (dtype) {
        case ScalarType::Byte: return "uint8";
        case ScalarType::Char: return "int8";
        case ScalarType::Short: return "int16";
        case ScalarType::Int: return "int32";
        case ScalarType::Long: return "int64";
        case ScalarType::Half: return "float16";
        case ScalarType::BFloat16: return "bfloat16";
        case ScalarType::Float: return "float32";
        case ScalarType::Double: return "float64";
        case ScalarType::Bool: return "bool";
        default: return "another dtype";
    }
}

inline void check_dtype(const Tensor& tensor, const char* name, ScalarType wanted) {
    STD_TORCH_CHECK(tensor.scalar_type() == wanted, name, " must be ", dtype_name(wanted), ", got ",
                    dtype_name(tensor.scalar_type()));
}

inline Dtype check_float(ScalarType dtype, const char* name) {
    switch (dtype) {
        case ScalarType::Float: return Dtype::float32;
        case ScalarType::Half: return Dtype::float16;
        case ScalarType::BFloat16: return Dtype::bfloat16;
        default: STD_TORCH_CHECK(false, name, " must be float32, float16 or bfloat16, got ", dtype_name(dtype));
    }
}

inline void check_matrix(const Tensor& tensor, const char* name) {
    STD_TORCH_CHECK(tensor.dim() == 2, name, " must have 2 dimensions, got shape ", shape_of(tensor));
}

inline void check_shape(const Tensor& tensor, const char* name, int64_t rows, int64_t cols) {
    STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == cols, name, " must have shape (",
                    rows, ", ", cols, "), got ", shape_of(tensor));
}

inline void check_length(const Tensor& tensor, const char* name, int64_t length) {
    STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == length, name, " must have shape (", length, "), got ",
                    shape_of(tensor));
}

inline std::string device_name(const Tensor& tensor) {
    return tensor.is_cpu()    ? "cpu"
           : tensor.is_cuda() ? "cuda:" + std::to_string(tensor.get_device_index())
                              : "another device";
}

inline void check_device(const Tensor& tensor, const char* name, const Tensor& other, const char* other_name) {
    STD_TORCH_CHECK(tensor.is_cpu() == other.is_cpu() && tensor.get_device_index() == other.get_device_index(), name,
                    " is on ", device_name(tensor), " but ", other_name, " is on ", device_name(other));
}

inline void check_bits(int64_t bits) { STD_TORCH_CHECK(bits >= 2 && bits <= 8, "bits must be 2 to 8, got ", bits); }

inline void check_axis(int64_t axis) {
    STD_TORCH_CHECK(axis == 0 || axis == 1, "axis must be 1 (input columns) or 0 (output rows), got ", axis);
}

// x's K against the bytes of a packed row, the only trace of K that storage keeps.
inline void check_packed(const Tensor& weight_packed, int64_t K, int64_t bits, const char* k_owner) {
    check_bits(bits);
    check_dtype(weight_packed, "weight_packed", ScalarType::Byte);
    check_matrix(weight_packed, "weight_packed");
    const int container = container_bits(bits);
    STD_TORCH_CHECK(K >= 0 && weight_packed.size(1) == packed_row_bytes(K, container), k_owner, " has K = ", K,
                    " but weight_packed packs ", weight_packed.size(1) * 8 / container, " (", weight_packed.size(1),
                    " bytes a row, ", container, "-bit containers)");
}

// scale or zero_point: one value per tensor, row or group.
inline void check_blocks(const Tensor& blocks, const char* name, ScalarType dtype, int64_t N, int64_t K) {
    check_dtype(blocks, name, dtype);
    check_matrix(blocks, name);
    const int64_t rows = blocks.size(0), G = blocks.size(1);
    STD_TORCH_CHECK((rows == 1 && G == 1) || (rows == N && G >= 1 && K % G == 0), name,
                    " must have shape (1, 1), (N, 1) or (N, G) with G dividing K, N = ", N, " and K = ", K, ", got ",
                    shape_of(blocks));
}

inline void check_block_pair(const Tensor& scale, const Tensor& zero_point, int64_t N, int64_t K) {
    check_blocks(scale, "scale", ScalarType::Float, N, K);
    check_dtype(zero_point, "zero_point", ScalarType::Byte);
    check_shape(zero_point, "zero_point", scale.size(0), scale.size(1));
}

// Indices are read back only where that costs nothing; CUDA kernels skip an index out of range instead of
// synchronizing.
inline void check_indices(const Tensor& indices, const char* name, int64_t size) {
    check_dtype(indices, name, ScalarType::Long);
    if (!indices.is_cpu()) return;
    const int64_t* values = indices.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < indices.numel(); ++i)
        STD_TORCH_CHECK(values[i] >= 0 && values[i] < size, name, " must be 0 to ", size - 1, ", got ", values[i],
                        " at position ", i);
}

inline void check_outlier_dims(const Tensor& outlier_dims, int64_t axis, int64_t N, int64_t K) {
    check_axis(axis);
    STD_TORCH_CHECK(outlier_dims.dim() == 1, "outlier_dims must have 1 dimension, got shape ", shape_of(outlier_dims));
    check_indices(outlier_dims, "outlier_dims", axis == 1 ? K : N);
}

}  // namespace prequant
