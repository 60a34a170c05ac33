// Canonical storage: pack, unpack, prepack, unprepack, dequantize, scatter_outlier_.
#include "ops.h"

namespace prequant {

Tensor pack(const Tensor& codes, int64_t bits) {
    check_bits(bits);
    check_dtype(codes, "codes", ScalarType::Byte);
    check_matrix(codes, "codes");
    const int64_t N = codes.size(0), K = codes.size(1);
    const int container = container_bits(bits);
    Device device(codes);
    Tensor packed = empty_on(codes, {N, packed_row_bytes(K, container)}, ScalarType::Byte);
    const Tensor codes_ = row_major(codes);
    device.require(&Kernels::pack, "pack")(codes_.const_data_ptr<uint8_t>(), N, K, container,
                                           packed.mutable_data_ptr<uint8_t>(), device.stream());
    return packed;
}

Tensor unpack(const Tensor& weight_packed, int64_t K, int64_t bits) {
    check_packed(weight_packed, K, bits, "unpack");
    const int64_t N = weight_packed.size(0);
    Device device(weight_packed);
    Tensor codes = empty_on(weight_packed, {N, K}, ScalarType::Byte);
    const Tensor packed_ = row_major(weight_packed);
    device.require(&Kernels::unpack, "unpack")(packed_.const_data_ptr<uint8_t>(), N, K, container_bits(bits),
                                               codes.mutable_data_ptr<uint8_t>(), device.stream());
    return codes;
}

Tensor prepack(const Tensor& weight_packed, int64_t K, int64_t bits) {
    check_packed(weight_packed, K, bits, "prepack");
    const int64_t N = weight_packed.size(0);
    const int container = container_bits(bits);
    Device device(weight_packed);
    const auto [size] = prepacked_shape(weight_packed, N, K, container);
    Tensor prepacked = empty_on(weight_packed, {size[0], size[1], size[2]}, ScalarType::Byte);
    const Tensor packed_ = row_major(weight_packed);
    device.require(&Kernels::prepack, "prepack")(packed_.const_data_ptr<uint8_t>(), N, K, container,
                                                 prepacked.mutable_data_ptr<uint8_t>(), device.stream());
    return prepacked;
}

Tensor unprepack(const Tensor& prepacked, int64_t N, int64_t K, int64_t bits) {
    check_prepacked(prepacked, "prepacked", N, K, bits);
    const int container = container_bits(bits);
    Device device(prepacked);
    Tensor packed = empty_on(prepacked, {N, packed_row_bytes(K, container)}, ScalarType::Byte);
    const Tensor prepacked_ = row_major(prepacked);
    device.require(&Kernels::unprepack, "unprepack")(prepacked_.const_data_ptr<uint8_t>(), N, K, container,
                                                     packed.mutable_data_ptr<uint8_t>(), device.stream());
    return packed;
}

Tensor dequantize(const Tensor& weight_packed, const Tensor& scale, const Tensor& zero_point, int64_t K, int64_t bits,
                  ScalarType dtype, int64_t row_begin, std::optional<int64_t> row_end) {
    check_matrix(weight_packed, "weight_packed");
    const int64_t N = weight_packed.size(0);
    const WeightArguments weight(weight_packed, scale, zero_point, N, K, bits, "dequantize");
    check_float(dtype, "dtype");
    const int64_t end = row_end.value_or(N);
    STD_TORCH_CHECK(0 <= row_begin && row_begin <= end && end <= N, "rows must be a range inside 0 to ", N,
                    ", got row_begin = ", row_begin, " and row_end = ", end);
    Device device(weight_packed);
    Tensor dense = empty_on(weight_packed, {end - row_begin, K}, dtype);
    device.require(&Kernels::dequantize, "dequantize")(weight.view(), row_begin, mutable_matrix(dense, "dtype"),
                                                       device.stream());
    return dense;
}

void scatter_outlier_(const Tensor& dense, const Tensor& outlier_dims, const Tensor& outlier_weight, int64_t axis,
                      bool accumulate) {
    check_matrix(dense, "dense");
    STD_TORCH_CHECK(dense.is_contiguous(), "dense must be contiguous: it is written in place");
    const OutlierArguments outliers(outlier_dims, outlier_weight, axis, dense.size(0), dense.size(1));
    check_device(outlier_weight, "outlier_weight", dense, "dense");
    check_device(outlier_dims, "outlier_dims", dense, "dense");
    Device device(dense);
    Tensor target = dense;
    device.require(&Kernels::scatter_outlier_, "scatter_outlier_")(mutable_matrix(target, "dense"), outliers.view(),
                                                                   accumulate, device.stream());
    // The stable ABI has no way to raise the version counter that autograd checks, but a view shares it with its base:
    // fill an empty one.
    Tensor empty_view = torch::stable::narrow(target, 0, 0, 0);
    torch::stable::zero_(empty_view);
}

Weight in_layout(Device& device, Weight weight, bool is_prepacked) {
    if (weight.is_prepacked == is_prepacked) return weight;
    const auto convert =
        is_prepacked ? device.require(&Kernels::prepack, "prepack") : device.require(&Kernels::unprepack, "unprepack");
    const int64_t bytes = is_prepacked ? device.prepacked_bytes(weight.N, weight.K, weight.container)
                                       : weight.N * packed_row_bytes(weight.K, weight.container);
    uint8_t* converted = static_cast<uint8_t*>(device.stream().scratch(bytes));
    convert(weight.packed, weight.N, weight.K, weight.container, converted, device.stream());
    weight.packed = converted;
    weight.is_prepacked = is_prepacked;
    return weight;
}

}  // namespace prequant
