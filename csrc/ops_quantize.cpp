// From a float weight to codes: weight_stats, outlier_counts, select_outlier_dims, quantize_pack.
#include "ops.h"

namespace prequant {

std::tuple<Tensor, Tensor, Tensor, Tensor> weight_stats(const Tensor& weight, int64_t block_size) {
    check_matrix(weight, "weight");
    const Tensor weight_ = row_major(weight);
    const Matrix view = matrix(weight_, "weight");
    const int64_t N = view.rows, K = view.cols;
    STD_TORCH_CHECK(N > 0 && K > 0, "weight is empty: shape ", shape_of(weight));
    STD_TORCH_CHECK(block_size == N * K || (block_size > 0 && K % block_size == 0),
                    "block_size must be N * K = ", N * K, " or divide K = ", K, ", got ", block_size);
    const int64_t rows = block_size == N * K ? 1 : N, cols = block_size == N * K ? 1 : K / block_size;
    Device device(weight);
    const auto empty = [&] { return empty_on(weight, {rows, cols}, ScalarType::Double); };
    Tensor mean = empty(), std = empty(), minimum = empty(), maximum = empty();
    device.require(&Kernels::weight_stats, "weight_stats")(
        view, block_size, mean.mutable_data_ptr<double>(), std.mutable_data_ptr<double>(),
        minimum.mutable_data_ptr<double>(), maximum.mutable_data_ptr<double>(), device.stream());
    return {mean, std, minimum, maximum};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> outlier_counts(const Tensor& weight, const Tensor& mean, const Tensor& std,
                                                          double threshold) {
    check_matrix(weight, "weight");
    for (const auto& [statistic, name] : {std::pair(&mean, "mean"), std::pair(&std, "std")}) {
        check_dtype(*statistic, name, ScalarType::Double);
        check_shape(*statistic, name, 1, 1);
        check_device(*statistic, name, weight, "weight");
    }
    STD_TORCH_CHECK(threshold > 0, "threshold must be positive, got ", threshold);
    const Tensor weight_ = row_major(weight);
    const Matrix view = matrix(weight_, "weight");
    Device device(weight);
    const auto empty = [&](int64_t size) { return empty_on(weight, {size}, ScalarType::Long); };
    Tensor column_counts = empty(view.cols), column_energy = empty(view.cols), row_counts = empty(view.rows),
           row_energy = empty(view.rows);
    device.require(&Kernels::outlier_counts, "outlier_counts")(
        view, mean.const_data_ptr<double>(), std.const_data_ptr<double>(), threshold,
        column_counts.mutable_data_ptr<int64_t>(), column_energy.mutable_data_ptr<int64_t>(),
        row_counts.mutable_data_ptr<int64_t>(), row_energy.mutable_data_ptr<int64_t>(), device.stream());
    return {column_counts, column_energy, row_counts, row_energy};
}

Tensor select_outlier_dims(const Tensor& counts, const Tensor& energy, int64_t r) {
    check_dtype(counts, "counts", ScalarType::Long);
    check_dtype(energy, "energy", ScalarType::Long);
    STD_TORCH_CHECK(counts.dim() == 1, "counts must have 1 dimension, got shape ", shape_of(counts));
    check_length(energy, "energy", counts.size(0));
    check_device(energy, "energy", counts, "counts");
    STD_TORCH_CHECK(r >= 0 && r <= counts.size(0), "r must be 0 to ", counts.size(0),
                    ", the number of dimensions, got ", r);
    Device device(counts);
    Tensor dims = empty_on(counts, {r}, ScalarType::Long);
    const Tensor counts_ = row_major(counts), energy_ = row_major(energy);
    device.require(&Kernels::select_outlier_dims, "select_outlier_dims")(
        counts_.const_data_ptr<int64_t>(), energy_.const_data_ptr<int64_t>(), counts.size(0), r,
        dims.mutable_data_ptr<int64_t>(), device.stream());
    return dims;
}

Tensor quantize_pack(const Tensor& weight, const Tensor& scale, const Tensor& zero_point, int64_t bits,
                     const Tensor& outlier_dims, int64_t axis) {
    check_bits(bits);
    check_matrix(weight, "weight");
    const Tensor weight_ = row_major(weight);
    const Matrix view = matrix(weight_, "weight");
    check_block_pair(scale, zero_point, view.rows, view.cols);
    check_outlier_dims(outlier_dims, axis, view.rows, view.cols);
    check_device(scale, "scale", weight, "weight");
    check_device(zero_point, "zero_point", weight, "weight");
    check_device(outlier_dims, "outlier_dims", weight, "weight");
    Device device(weight);
    Tensor packed = empty_on(weight, {view.rows, packed_row_bytes(view.cols, container_bits(bits))}, ScalarType::Byte);
    const Tensor scale_ = row_major(scale), zero_point_ = row_major(zero_point), dims_ = row_major(outlier_dims);
    device.require(&Kernels::quantize_pack, "quantize_pack")(
        view, scale_.const_data_ptr<float>(), zero_point_.const_data_ptr<uint8_t>(), scale.size(0), scale.size(1),
        static_cast<int>(bits), dims_.const_data_ptr<int64_t>(), outlier_dims.size(0), static_cast<int>(axis),
        packed.mutable_data_ptr<uint8_t>(), device.stream());
    return packed;
}

}  // namespace prequant
