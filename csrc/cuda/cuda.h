// The CUDA kernels' launchers, as the table of ../kernels.h calls them: one .cu each, named for its operator.
#pragma once

#include "../kernels.h"

namespace prequant::cuda {

void weight_stats(Matrix weight, int64_t block_size, double* mean, double* std, double* minimum, double* maximum,
                  Stream stream);
void outlier_counts(Matrix weight, const double* mean, const double* std, double threshold, int64_t* column_counts,
                    int64_t* column_energy, int64_t* row_counts, int64_t* row_energy, Stream stream);
void select_outlier_dims(const int64_t* counts, const int64_t* energy, int64_t size, int64_t r, int64_t* dims,
                         Stream stream);
void quantize_pack(Matrix weight, const float* scale, const uint8_t* zero_point, int64_t scale_rows, int64_t G,
                   int bits, const int64_t* outlier_dims, int64_t r, int axis, uint8_t* packed, Stream stream);
void pack(const uint8_t* codes, int64_t N, int64_t K, int container, uint8_t* packed, Stream stream);
void unpack(const uint8_t* packed, int64_t N, int64_t K, int container, uint8_t* codes, Stream stream);
void prepack(const uint8_t* packed, int64_t N, int64_t K, int container, uint8_t* prepacked, Stream stream);
void unprepack(const uint8_t* prepacked, int64_t N, int64_t K, int container, uint8_t* packed, Stream stream);
void dequantize(Weight weight, int64_t row_begin, MutableMatrix dense, Stream stream);
void scatter_outlier_(MutableMatrix dense, Outliers outliers, bool accumulate, Stream stream);
void embedding(const int64_t* ids, const uint8_t* codes, const float* scale, const uint8_t* zero_point, int64_t V,
               bool per_row, MutableMatrix rows, Stream stream);
void quantize_activations(Matrix x, bool per_token, int64_t G, const int64_t* excluded, int64_t size, uint8_t* codes,
                          float* scale, uint8_t* zero_point, int32_t* sums, Stream stream);
void linear_w4a16(Matrix x, Weight weight, Outliers outliers, const float* bias, bool in_float32, MutableMatrix y,
                  Stream stream);
void linear_w4a8(Activations x, const Matrix* raw, Weight weight, Outliers outliers, const float* bias, MutableMatrix y,
                 Stream stream);
void linear_dx(Matrix grad_y, Weight weight, Outliers outliers, bool in_float32, MutableMatrix grad_x, Stream stream);
void outlier_grad(Matrix grad_y, Matrix x, Activations codes, const int64_t* dims, int64_t r, int axis, float* gradient,
                  Stream stream);
void scale_grad(Matrix grad_y, Matrix x, Activations codes, Weight weight, float* gradient, Stream stream);

// What nvcc built: its version ("13.0") and the architectures ("8.0 9.0+PTX").
const char* toolkit_version();
const char* architectures();

}  // namespace prequant::cuda
