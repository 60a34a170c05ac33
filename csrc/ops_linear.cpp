// The layer at run time: quantize_activations, embedding, linear_w4a16, linear_w4a8 and the three gradients.
#include <torch/csrc/stable/stableivalue_conversions.h>

#include <array>

#include "ops.h"

namespace prequant {

std::tuple<Tensor, Tensor, Tensor, Tensor> quantize_activations(const Tensor& x, bool per_token, int64_t group_size,
                                                                const std::optional<Tensor>& excluded_dims) {
    check_matrix(x, "x");
    const Tensor x_ = row_major(x);
    const Matrix view = matrix(x_, "x");
    const int64_t M = view.rows, K = view.cols;
    STD_TORCH_CHECK(group_size >= 0 && (group_size == 0 || K % group_size == 0),
                    "group_size must be 0 (one group) or divide K = ", K, ", got ", group_size);
    const int64_t G = group_size == 0 ? 1 : K / group_size;
    Tensor excluded_;
    if (excluded_dims.has_value()) {
        check_outlier_dims(*excluded_dims, 1, 0, K);
        check_device(*excluded_dims, "excluded_dims", x, "x");
        excluded_ = row_major(*excluded_dims);
    }
    Device device(x);
    const int64_t ranges = per_token ? M : 1;
    Tensor codes = empty_on(x, {M, K}, ScalarType::Byte), scale = empty_on(x, {ranges, 1}, ScalarType::Float);
    Tensor zero_point = empty_on(x, {ranges, 1}, ScalarType::Byte), sums = empty_on(x, {M, G}, ScalarType::Int);
    device.require(&Kernels::quantize_activations, "quantize_activations")(
        view, per_token, G, excluded_dims ? excluded_.const_data_ptr<int64_t>() : nullptr,
        excluded_dims ? excluded_.size(0) : 0, codes.mutable_data_ptr<uint8_t>(), scale.mutable_data_ptr<float>(),
        zero_point.mutable_data_ptr<uint8_t>(), sums.mutable_data_ptr<int32_t>(), device.stream());
    return {codes, scale, zero_point, sums};
}

Tensor embedding(const Tensor& ids, const Tensor& codes, const Tensor& scale, const Tensor& zero_point,
                 ScalarType dtype) {
    STD_TORCH_CHECK(ids.dim() == 1, "ids must have 1 dimension, got shape ", shape_of(ids));
    check_dtype(codes, "codes", ScalarType::Byte);
    check_matrix(codes, "codes");
    const int64_t V = codes.size(0), D = codes.size(1);
    check_indices(ids, "ids", V);
    check_block_pair(scale, zero_point, V, D);
    STD_TORCH_CHECK(scale.size(1) == 1, "scale of an embedding must have shape (1, 1) or (", V, ", 1), got ",
                    shape_of(scale));
    check_device(ids, "ids", codes, "codes");
    check_device(scale, "scale", codes, "codes");
    check_device(zero_point, "zero_point", codes, "codes");
    check_float(dtype, "dtype");
    Device device(codes);
    Tensor rows = empty_on(codes, {ids.size(0), D}, dtype);
    const Tensor ids_ = row_major(ids), codes_ = row_major(codes), scale_ = row_major(scale),
                 zero_point_ = row_major(zero_point);
    device.require(&Kernels::embedding, "embedding")(
        ids_.const_data_ptr<int64_t>(), codes_.const_data_ptr<uint8_t>(), scale_.const_data_ptr<float>(),
        zero_point_.const_data_ptr<uint8_t>(), V, scale.size(0) > 1, mutable_matrix(rows, "dtype"), device.stream());
    return rows;
}

// A bias as kernels take it: float32, or null.
class BiasArgument {
   public:
    BiasArgument(const std::optional<Tensor>& bias, const Tensor& x, int64_t N) {
        if (!bias.has_value()) return;
        check_float(bias->scalar_type(), "bias");
        check_length(*bias, "bias", N);
        check_device(*bias, "bias", x, "x");
        bias_ =
            row_major(bias->scalar_type() == ScalarType::Float ? *bias : torch::stable::to(*bias, ScalarType::Float));
        data_ = bias_.const_data_ptr<float>();
    }
    const float* data() const { return data_; }

   private:
    Tensor bias_;
    const float* data_ = nullptr;
};

// The weight's dense matrix (N, K) in this dtype, outlier dimensions added: transient scratch of one product.
static Tensor dense_weight(Device& device, const Tensor& like, const Weight& weight, const Outliers& outliers,
                           ScalarType dtype) {
    Tensor dense = empty_on(like, {weight.N, weight.K}, dtype);
    device.require(&Kernels::dequantize, "dequantize")(weight, 0, mutable_matrix(dense, "dtype"), device.stream());
    device.require(&Kernels::scatter_outlier_, "scatter_outlier_")(mutable_matrix(dense, "dtype"), outliers, true,
                                                                   device.stream());
    return dense;
}

static bool prefers_dense(const Device& device, int64_t M, const Weight& weight, ScalarType dtype, bool is_backward) {
    const auto choose = device.kernels() == nullptr ? nullptr : device.kernels()->prefers_dense;
    return choose != nullptr && choose(M, weight, check_float(dtype, "x"), is_backward);
}

static bool reads_prepacked(const Device& device) {
    return device.kernels() != nullptr && device.kernels()->linear_reads_prepacked;
}

// torch's own product, through the dispatcher: y = x dense^T + bias.
static Tensor dense_linear(const Tensor& x, const Tensor& dense, const std::optional<Tensor>& bias) {
    std::optional<Tensor> bias_;
    if (bias.has_value()) bias_ = torch::stable::to(*bias, x.scalar_type());
    std::array<StableIValue, 3> stack{torch::stable::detail::from(x), torch::stable::detail::from(dense),
                                      torch::stable::detail::from(bias_)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
    return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor linear_w4a16(const Tensor& x, const Tensor& weight_packed, const Tensor& scale, const Tensor& zero_point,
                    const Tensor& outlier_dims, const Tensor& outlier_weight, const std::optional<Tensor>& bias,
                    int64_t bits, int64_t axis, std::optional<int64_t> out_features, bool in_float32) {
    check_matrix(x, "x");
    const Tensor x_ = row_major(x);
    const Matrix view = matrix(x_, "x");
    const int64_t N = rows_of(weight_packed, out_features);
    const WeightArguments weight(weight_packed, scale, zero_point, N, view.cols, bits, "x");
    const OutlierArguments outliers(outlier_dims, outlier_weight, axis, N, view.cols);
    const BiasArgument bias_(bias, x, N);
    check_layer_device(x, "x", weight_packed, outlier_dims, outlier_weight);
    Device device(x);
    const auto kernel = device.require(&Kernels::linear_w4a16, "linear_w4a16");
    if (prefers_dense(device, view.rows, weight.view(), x.scalar_type(), false))
        return dense_linear(x_, dense_weight(device, x, weight.view(), outliers.view(), x.scalar_type()), bias);
    Tensor y = empty_on(x, {view.rows, N}, x.scalar_type());
    kernel(view, in_layout(device, weight.view(), reads_prepacked(device)), outliers.view(), bias_.data(),
           in_float32 && view.dtype == Dtype::float32, mutable_matrix(y, "x"), device.stream());
    return y;
}

// The activations of linear_w4a8: as they were given, or made here in scratch that lasts as long as this.
class LinearActivations {
   public:
    LinearActivations(const std::optional<Tensor>& codes, const std::optional<Tensor>& scale,
                      const std::optional<Tensor>& zero_point, const std::optional<Tensor>& sums, const Tensor& x,
                      int64_t M, int64_t K, int64_t G) {
        STD_TORCH_CHECK(codes.has_value() == scale.has_value() && codes.has_value() == zero_point.has_value() &&
                            codes.has_value() == sums.has_value(),
                        "x_codes, x_scale, x_zero_point and x_sums must be given together, or none of them");
        if (!codes.has_value()) return;
        given_.emplace(*codes, *scale, *zero_point, M, K);
        check_dtype(*sums, "x_sums", ScalarType::Int);
        check_shape(*sums, "x_sums", M, G);
        check_device(*codes, "x_codes", x, "x");
        check_device(*sums, "x_sums", x, "x");
        sums_ = row_major(*sums);
    }
    bool are_given() const { return given_.has_value(); }
    Activations view() const {
        Activations view = given_->view();
        view.sums = sums_.const_data_ptr<int32_t>();
        return view;
    }

   private:
    std::optional<ActivationArguments> given_;
    Tensor sums_;
};

static Activations quantize_into_scratch(Device& device, const Matrix& x, bool per_token, int64_t G,
                                         const int64_t* excluded, int64_t size) {
    const auto quantize = device.require(&Kernels::quantize_activations, "quantize_activations");
    const int64_t M = x.rows, K = x.cols, ranges = per_token ? M : 1;
    constexpr int64_t kAlignment = 256;  // as a tensor of its own would have
    const auto after = [](int64_t begin, int64_t bytes) { return begin + ceil_div(bytes, kAlignment) * kAlignment; };
    const int64_t sums = after(0, ranges * 4), zero_points = after(sums, M * G * 4), codes = after(zero_points, ranges);
    uint8_t* const memory = static_cast<uint8_t*>(device.stream().scratch(codes + M * K + 1));
    Activations made{memory + codes,
                     reinterpret_cast<float*>(memory),
                     memory + zero_points,
                     reinterpret_cast<int32_t*>(memory + sums),
                     M,
                     K,
                     per_token};
    quantize(x, per_token, G, excluded, size, memory + codes, reinterpret_cast<float*>(memory), memory + zero_points,
             reinterpret_cast<int32_t*>(memory + sums), device.stream());
    return made;
}

Tensor linear_w4a8(const Tensor& x, const std::optional<Tensor>& x_codes, const std::optional<Tensor>& x_scale,
                   const std::optional<Tensor>& x_zero_point, const std::optional<Tensor>& x_sums,
                   const Tensor& weight_packed, const Tensor& scale, const Tensor& zero_point,
                   const Tensor& outlier_dims, const Tensor& outlier_weight, const std::optional<Tensor>& bias,
                   int64_t bits, int64_t axis, bool raw_outliers, std::optional<int64_t> out_features, bool per_token) {
    check_matrix(x, "x");
    const int64_t M = x.size(0), K = x.size(1), N = rows_of(weight_packed, out_features);
    const WeightArguments weight(weight_packed, scale, zero_point, N, K, bits, "x");
    const OutlierArguments outliers(outlier_dims, outlier_weight, axis, N, K);
    const LinearActivations activations(x_codes, x_scale, x_zero_point, x_sums, x, M, K, scale.size(1));
    STD_TORCH_CHECK(!raw_outliers || axis == 1,
                    "raw_outliers multiplies input columns and needs axis = 1, got axis = 0");
    const BiasArgument bias_(bias, x, N);
    check_layer_device(x, "x", weight_packed, outlier_dims, outlier_weight);
    Device device(x);
    const auto kernel = device.require(&Kernels::linear_w4a8, "linear_w4a8");
    Tensor y = empty_on(x, {M, N}, x.scalar_type());
    const Tensor x_ = raw_outliers || !activations.are_given() ? row_major(x) : x;
    const Matrix floats = matrix(x_, "x");
    const Outliers outliers_ = outliers.view();
    const Activations view = activations.are_given() ? activations.view()
                                                     : quantize_into_scratch(device, floats, per_token, scale.size(1),
                                                                             raw_outliers ? outliers_.dims : nullptr,
                                                                             raw_outliers ? outliers_.r : 0);
    kernel(view, raw_outliers ? &floats : nullptr, in_layout(device, weight.view(), reads_prepacked(device)), outliers_,
           bias_.data(), mutable_matrix(y, "x"), device.stream());
    return y;
}

Tensor linear_dx(const Tensor& grad_y, const Tensor& weight_packed, const Tensor& scale, const Tensor& zero_point,
                 const Tensor& outlier_dims, const Tensor& outlier_weight, int64_t K, int64_t bits, int64_t axis,
                 bool in_float32) {
    check_matrix(grad_y, "grad_y");
    const int64_t N = weight_packed.dim() == 3 ? grad_y.size(1) : rows_of(weight_packed, std::nullopt);
    const WeightArguments weight(weight_packed, scale, zero_point, N, K, bits, "linear_dx");
    STD_TORCH_CHECK(grad_y.size(1) == N, "grad_y has N = ", grad_y.size(1), " but weight_packed has ", N, " rows");
    const OutlierArguments outliers(outlier_dims, outlier_weight, axis, N, K);
    check_layer_device(grad_y, "grad_y", weight_packed, outlier_dims, outlier_weight);
    const Tensor grad_ = row_major(grad_y);
    Device device(grad_y);
    const auto kernel = device.require(&Kernels::linear_dx, "linear_dx");
    if (prefers_dense(device, grad_y.size(0), weight.view(), grad_y.scalar_type(), true))
        return torch::stable::matmul(
            grad_, dense_weight(device, grad_y, weight.view(), outliers.view(), grad_y.scalar_type()));
    Tensor grad_x = empty_on(grad_y, {grad_y.size(0), K}, grad_y.scalar_type());
    const Matrix view = matrix(grad_, "grad_y");
    kernel(view, in_layout(device, weight.view(), reads_prepacked(device)), outliers.view(),
           in_float32 && view.dtype == Dtype::float32, mutable_matrix(grad_x, "grad_y"), device.stream());
    return grad_x;
}

// x of a gradient: floats, or codes with their scale and zero point. The other one stays null.
struct FloatOrCodes {
    Matrix floats{nullptr, Dtype::float32, 0, 0};
    Activations codes{};
};

static FloatOrCodes float_or_codes(const Tensor& x_, const std::optional<ActivationArguments>& activations) {
    FloatOrCodes result;
    if (activations.has_value()) {
        result.codes = activations->view();
    } else {
        result.floats = matrix(x_, "x");
    }
    return result;
}

static std::optional<ActivationArguments> saved_activations(const Tensor& x, const std::optional<Tensor>& x_scale,
                                                            const std::optional<Tensor>& x_zero_point) {
    STD_TORCH_CHECK(x_scale.has_value() == x_zero_point.has_value(), "x_scale and x_zero_point must be given together");
    if (!x_scale.has_value()) return std::nullopt;
    return ActivationArguments(x, *x_scale, *x_zero_point, x.size(0), x.size(1));
}

Tensor outlier_grad(const Tensor& grad_y, const Tensor& x, const std::optional<Tensor>& x_scale,
                    const std::optional<Tensor>& x_zero_point, const Tensor& outlier_dims, int64_t axis) {
    check_matrix(grad_y, "grad_y");
    check_matrix(x, "x");
    const int64_t M = grad_y.size(0), N = grad_y.size(1), r = outlier_dims.size(0);
    STD_TORCH_CHECK(x.size(0) == M, "x has M = ", x.size(0), " rows but grad_y has ", M);
    check_axis(axis);
    if (axis == 1) {
        STD_TORCH_CHECK(outlier_dims.dim() == 1 && x.size(1) == r, "x must hold the r = ", r, " outlier columns, got ",
                        x.size(1), " columns");
    } else {
        check_outlier_dims(outlier_dims, 0, N, x.size(1));
    }
    check_device(x, "x", grad_y, "grad_y");
    check_device(outlier_dims, "outlier_dims", grad_y, "grad_y");
    const std::optional<ActivationArguments> activations = saved_activations(x, x_scale, x_zero_point);
    const Tensor grad_ = row_major(grad_y), x_ = row_major(x), dims_ = row_major(outlier_dims);
    const FloatOrCodes source = float_or_codes(x_, activations);
    Device device(grad_y);
    Tensor gradient = empty_on(grad_y, {axis == 1 ? N : r, x.size(1)}, ScalarType::Float);
    device.require(&Kernels::outlier_grad, "outlier_grad")(matrix(grad_, "grad_y"), source.floats, source.codes,
                                                           dims_.const_data_ptr<int64_t>(), r, static_cast<int>(axis),
                                                           gradient.mutable_data_ptr<float>(), device.stream());
    return gradient;
}

Tensor scale_grad(const Tensor& grad_y, const Tensor& x, const std::optional<Tensor>& x_scale,
                  const std::optional<Tensor>& x_zero_point, const Tensor& weight_packed, const Tensor& zero_point,
                  int64_t bits) {
    check_matrix(grad_y, "grad_y");
    check_matrix(x, "x");
    const bool is_prepacked = weight_packed.dim() == 3;
    const int64_t M = grad_y.size(0), K = x.size(1),
                  N = is_prepacked ? grad_y.size(1) : rows_of(weight_packed, std::nullopt);
    if (is_prepacked)
        check_prepacked(weight_packed, "weight_packed", N, K, bits);
    else
        check_packed(weight_packed, K, bits, "x");
    STD_TORCH_CHECK(x.size(0) == M, "x has M = ", x.size(0), " rows but grad_y has ", M);
    STD_TORCH_CHECK(grad_y.size(1) == N, "grad_y has N = ", grad_y.size(1), " but weight_packed has ", N, " rows");
    check_blocks(zero_point, "zero_point", ScalarType::Byte, N, K);
    check_device(x, "x", grad_y, "grad_y");
    check_device(weight_packed, "weight_packed", grad_y, "grad_y");
    check_device(zero_point, "zero_point", grad_y, "grad_y");
    const std::optional<ActivationArguments> activations = saved_activations(x, x_scale, x_zero_point);
    const Tensor grad_ = row_major(grad_y), x_ = row_major(x), packed_ = row_major(weight_packed),
                 zero_point_ = row_major(zero_point);
    const FloatOrCodes source = float_or_codes(x_, activations);
    const Weight weight{packed_.const_data_ptr<uint8_t>(),
                        nullptr,
                        zero_point_.const_data_ptr<uint8_t>(),
                        N,
                        K,
                        zero_point.size(0),
                        zero_point.size(1),
                        container_bits(bits),
                        is_prepacked};
    Device device(grad_y);
    Tensor gradient = empty_on(grad_y, {N, zero_point.size(1)}, ScalarType::Float);
    const auto kernel = device.require(&Kernels::scale_grad, "scale_grad");
    kernel(matrix(grad_, "grad_y"), source.floats, source.codes,
           in_layout(device, weight, device.kernels()->scale_grad_reads_prepacked), gradient.mutable_data_ptr<float>(),
           device.stream());
    return gradient;
}

}  // namespace prequant
