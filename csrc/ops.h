// The host functions behind torch.ops.prequant (schemas in ops.cpp): check, allocate, call the device's kernel.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu/parallel.h"

namespace prequant {

// ops_quantize.cpp
std::tuple<Tensor, Tensor, Tensor, Tensor> weight_stats(const Tensor& weight, int64_t block_size);
std::tuple<Tensor, Tensor, Tensor, Tensor> outlier_counts(const Tensor& weight, const Tensor& mean, const Tensor& std,
                                                          double threshold);
Tensor select_outlier_dims(const Tensor& counts, const Tensor& energy, int64_t r);
Tensor quantize_pack(const Tensor& weight, const Tensor& scale, const Tensor& zero_point, int64_t bits,
                     const Tensor& outlier_dims, int64_t axis);

// ops_storage.cpp
Tensor pack(const Tensor& codes, int64_t bits);
Tensor unpack(const Tensor& weight_packed, int64_t K, int64_t bits);
Tensor prepack(const Tensor& weight_packed, int64_t K, int64_t bits);
Tensor unprepack(const Tensor& prepacked, int64_t N, int64_t K, int64_t bits);
Tensor dequantize(const Tensor& weight_packed, const Tensor& scale, const Tensor& zero_point, int64_t K, int64_t bits,
                  ScalarType dtype, int64_t row_begin, std::optional<int64_t> row_end);
void scatter_outlier_(const Tensor& dense, const Tensor& outlier_dims, const Tensor& outlier_weight, int64_t axis,
                      bool accumulate);

// ops_linear.cpp
std::tuple<Tensor, Tensor, Tensor, Tensor> quantize_activations(const Tensor& x, bool per_token, int64_t group_size,
                                                                const std::optional<Tensor>& excluded_dims);
Tensor embedding(const Tensor& ids, const Tensor& codes, const Tensor& scale, const Tensor& zero_point,
                 ScalarType dtype);
Tensor linear_w4a16(const Tensor& x, const Tensor& weight_packed, const Tensor& scale, const Tensor& zero_point,
                    const Tensor& outlier_dims, const Tensor& outlier_weight, const std::optional<Tensor>& bias,
                    int64_t bits, int64_t axis, std::optional<int64_t> out_features, bool in_float32);
Tensor linear_w4a8(const Tensor& x, const std::optional<Tensor>& x_codes, const std::optional<Tensor>& x_scale,
                   const std::optional<Tensor>& x_zero_point, const std::optional<Tensor>& x_sums,
                   const Tensor& weight_packed, const Tensor& scale, const Tensor& zero_point,
                   const Tensor& outlier_dims, const Tensor& outlier_weight, const std::optional<Tensor>& bias,
                   int64_t bits, int64_t axis, bool raw_outliers, std::optional<int64_t> out_features, bool per_token);
Tensor linear_dx(const Tensor& grad_y, const Tensor& weight_packed, const Tensor& scale, const Tensor& zero_point,
                 const Tensor& outlier_dims, const Tensor& outlier_weight, int64_t K, int64_t bits, int64_t axis,
                 bool in_float32);
Tensor outlier_grad(const Tensor& grad_y, const Tensor& x, const std::optional<Tensor>& x_scale,
                    const std::optional<Tensor>& x_zero_point, const Tensor& outlier_dims, int64_t axis);
Tensor scale_grad(const Tensor& grad_y, const Tensor& x, const std::optional<Tensor>& x_scale,
                  const std::optional<Tensor>& x_zero_point, const Tensor& weight_packed, const Tensor& zero_point,
                  int64_t bits);

// ---- what the host functions share ----

// The table of the device that a tensor is on. A GPU is current from the first require() until this is gone.
class Device {
   public:
    explicit Device(const Tensor& tensor);  // device.cpp
    Device(const Device&) = delete;         // a stream points back to its device
    Stream stream() {
        return {stream_, [](void* device, int64_t bytes) { return static_cast<Device*>(device)->allocate(bytes); },
                this};
    }
    const Kernels* kernels() const { return kernels_; }
    int64_t prepacked_bytes(int64_t N, int64_t K, int container) const;

    // A kernel of the table by its operator's name, with the tensor's GPU made current and its stream looked up; the
    // arguments of the call are evaluated after it. An operator that this build lacks on this device is an error that
    // names the rebuild command.
    template <typename Kernel>
    Kernel require(Kernel Kernels::* kernel, const char* op) {
        if (kernels_ == nullptr || kernels_->*kernel == nullptr) missing(op);
        activate();
        return kernels_->*kernel;
    }

   private:
    [[noreturn]] void missing(const char* op) const;
    void activate();
    void* allocate(int64_t bytes);
    Tensor like_;
    std::string name_;
    const Kernels* kernels_ = nullptr;
    int32_t gpu_ = -1;
    void* stream_ = nullptr;
#ifndef PREQUANT_EMULATED
    std::vector<std::unique_ptr<Buffer>> buffers_;  // scratch on the CPU
#endif
    // On a GPU: goes back to the allocator with this, when kernels are enqueued; it reuses memory in stream order.
    std::vector<Tensor> scratch_;
    std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

// Whether a prepacked weight on this tensor's device is made of tensor-core chunks (formats.h), and not of panels.
bool has_chunks(const Tensor& tensor);  // device.cpp

struct PrepackedShape {
    int64_t size[3];
};

inline PrepackedShape prepacked_shape(const Tensor& like, int64_t N, int64_t K, int container) {
    if (has_chunks(like)) return {{ceil_div(N, kChunkRows), chunks_along(K), chunk_bytes(container)}};
    return {{ceil_div(N, kPanelRows), panel_words(K, container) + 1, kPanelBytes}};
}

inline void check_prepacked(const Tensor& prepacked, const char* name, int64_t N, int64_t K, int64_t bits) {
    check_bits(bits);
    check_dtype(prepacked, name, ScalarType::Byte);
    const auto [size] = prepacked_shape(prepacked, N, K, container_bits(bits));
    STD_TORCH_CHECK(N >= 0 && K >= 0 && prepacked.dim() == 3 && prepacked.size(0) == size[0] &&
                        prepacked.size(1) == size[1] && prepacked.size(2) == size[2],
                    name, " must have shape (", size[0], ", ", size[1], ", ", size[2], ") for N = ", N, ", K = ", K,
                    " on this device, got ", shape_of(prepacked));
    constexpr uintptr_t kAlignment = 16;  // of a lane's part of a chunk at 4 bits, read at once
    STD_TORCH_CHECK(!has_chunks(prepacked) || reinterpret_cast<uintptr_t>(prepacked.const_data_ptr()) % kAlignment == 0,
                    name, " must lie on a multiple of 16 bytes: clone() makes one that does");
}

inline Tensor empty_on(const Tensor& like, std::initializer_list<int64_t> size, ScalarType dtype) {
    return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(size.begin(), size.size()), dtype);
}

inline Matrix matrix(const Tensor& tensor, const char* name) {
    return {tensor.const_data_ptr(), check_float(tensor.scalar_type(), name), tensor.size(0), tensor.size(1)};
}

inline MutableMatrix mutable_matrix(Tensor& tensor, const char* name) {
    return {tensor.mutable_data_ptr(), check_float(tensor.scalar_type(), name), tensor.size(0), tensor.size(1)};
}

inline Tensor row_major(const Tensor& tensor) {
    return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// Argument bundles: checked once, made contiguous, kept alive for the kernel call.

class WeightArguments {
   public:
    // Canonical rows, or (3 dimensions) what prepack made of N of them.
    WeightArguments(const Tensor& weight_packed, const Tensor& scale, const Tensor& zero_point, int64_t N, int64_t K,
                    int64_t bits, const char* k_owner)
        : N_(N), K_(K), is_prepacked_(weight_packed.dim() == 3) {
        if (is_prepacked_)
            check_prepacked(weight_packed, "weight_packed", N, K, bits);
        else
            check_packed(weight_packed, K, bits, k_owner);
        check_block_pair(scale, zero_point, N, K);
        check_device(scale, "scale", weight_packed, "weight_packed");
        check_device(zero_point, "zero_point", weight_packed, "weight_packed");
        packed_ = row_major(weight_packed), scale_ = row_major(scale), zero_point_ = row_major(zero_point);
        container_ = container_bits(bits);
    }
    Weight view() const {
        return {packed_.const_data_ptr<uint8_t>(),
                scale_.const_data_ptr<float>(),
                zero_point_.const_data_ptr<uint8_t>(),
                N_,
                K_,
                scale_.size(0),
                scale_.size(1),
                container_,
                is_prepacked_};
    }

   private:
    Tensor packed_, scale_, zero_point_;
    int64_t N_, K_;
    int container_;
    bool is_prepacked_;
};

// Which N a linear's weight has: its rows, or where it is prepacked the argument out_features.
inline int64_t rows_of(const Tensor& weight_packed, std::optional<int64_t> out_features) {
    STD_TORCH_CHECK(weight_packed.dim() == 2 || weight_packed.dim() == 3,
                    "weight_packed must have 2 dimensions, or 3 where it is prepacked, got shape ",
                    shape_of(weight_packed));
    STD_TORCH_CHECK(weight_packed.dim() == 2 || out_features.has_value(),
                    "out_features must be given for a prepacked weight_packed of shape ", shape_of(weight_packed));
    const int64_t N = out_features.value_or(weight_packed.size(0));
    STD_TORCH_CHECK(weight_packed.dim() == 3 || N == weight_packed.size(0), "out_features is ", N,
                    " but weight_packed has ", weight_packed.size(0), " rows");
    return N;
}

// The view in the layout that the device's linear kernels read, or in canonical rows; converted into scratch where it
// is the other one.
Weight in_layout(Device& device, Weight weight, bool is_prepacked);

class OutlierArguments {
   public:
    OutlierArguments(const Tensor& outlier_dims, const Tensor& outlier_weight, int64_t axis, int64_t N, int64_t K) {
        check_outlier_dims(outlier_dims, axis, N, K);
        check_dtype(outlier_weight, "outlier_weight", ScalarType::Float);
        const int64_t r = outlier_dims.size(0);
        check_shape(outlier_weight, "outlier_weight", axis == 1 ? N : r, axis == 1 ? r : K);
        dims_ = row_major(outlier_dims), weight_ = row_major(outlier_weight), axis_ = static_cast<int>(axis);
    }
    Outliers view() const {
        return {dims_.const_data_ptr<int64_t>(), weight_.const_data_ptr<float>(), dims_.size(0), axis_};
    }

   private:
    Tensor dims_, weight_;
    int axis_;
};

class ActivationArguments {
   public:
    ActivationArguments(const Tensor& codes, const Tensor& scale, const Tensor& zero_point, int64_t M, int64_t K) {
        check_dtype(codes, "x_codes", ScalarType::Byte);
        check_shape(codes, "x_codes", M, K);
        check_dtype(scale, "x_scale", ScalarType::Float);
        STD_TORCH_CHECK(scale.dim() == 2 && (scale.size(0) == M || scale.size(0) == 1) && scale.size(1) == 1,
                        "x_scale must have shape (", M, ", 1) or (1, 1), got ", shape_of(scale));
        check_dtype(zero_point, "x_zero_point", ScalarType::Byte);
        check_shape(zero_point, "x_zero_point", scale.size(0), 1);
        check_device(scale, "x_scale", codes, "x_codes");
        check_device(zero_point, "x_zero_point", codes, "x_codes");
        codes_ = row_major(codes), scale_ = row_major(scale), zero_point_ = row_major(zero_point);
    }
    Activations view() const {
        return {codes_.const_data_ptr<uint8_t>(),
                scale_.const_data_ptr<float>(),
                zero_point_.const_data_ptr<uint8_t>(),
                nullptr,
                codes_.size(0),
                codes_.size(1),
                scale_.size(0) > 1};
    }

   private:
    Tensor codes_, scale_, zero_point_;
};

inline void check_layer_device(const Tensor& x, const char* name, const Tensor& weight_packed,
                               const Tensor& outlier_dims, const Tensor& outlier_weight) {
    check_device(weight_packed, "weight_packed", x, name);
    check_device(outlier_dims, "outlier_dims", x, name);
    check_device(outlier_weight, "outlier_weight", x, name);
}

}  // namespace prequant
