// axis 1: dense[n, dims[j]] = (or +=) values[n, j]
// axis 0: dense[dims[j], k] = (or +=) values[j, k]                                  Meaning: reference.scatter_outlier_
//
//   axis 1   a thread writes one value; neighbours have       axis 0   a thread writes four neighbours of one row: one
//            the values of one row.                                    load of 128 bits, one store of 128 or 64.
//            values (n)   0   1   2   3   4                            dims 3 17 18 40 41
//            column       3  17  18  40  41                            k    0 ... 3 | 4 ... 7 | ...
//
// Requires   dims distinct: two threads that meet in one element would race. A dimension that is out of range is
//            skipped, since the host does not read dims back from a GPU. Four at a time need a width that is a multiple
//            of 4, and aligned pointers; otherwise one at a time.
// Rounds     a value to dense's type, then the sum once more: as plain torch adds two tensors of that type.
// Limited by latency: r of the columns or rows, a few sectors each.
#include "cuda.h"
#include "portable.cuh"

namespace prequant::cuda {

namespace {

template <typename T>
__device__ T written(T old, float value, bool accumulate) {
    const T rounded = from_float<T>(value);
    return accumulate ? from_float<T>(to_float(old) + to_float(rounded)) : rounded;
}

template <typename T>
__global__ void scatter_columns_kernel(T* __restrict__ dense, int64_t N, int64_t K, Outliers outliers,
                                       bool accumulate) {
    const int64_t n = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
    if (n >= N) return;
    for (int64_t j = int64_t(blockIdx.y) * blockDim.x + threadIdx.x; j < outliers.r;
         j += int64_t(gridDim.y) * blockDim.x) {
        const int64_t k = outliers.dims[j];
        if (k < 0 || k >= K) continue;
        T& element = dense[n * K + k];
        element = written(element, outliers.values[n * outliers.r + j], accumulate);
    }
}

template <typename T, int kValues>
__global__ void scatter_rows_kernel(T* __restrict__ dense, int64_t N, int64_t row_vectors, Outliers outliers,
                                    bool accumulate) {
    using Values = Vector<float, kValues>;
    using Elements = Vector<T, kValues>;
    const int64_t j = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
    if (j >= outliers.r) return;
    const int64_t n = outliers.dims[j];
    if (n < 0 || n >= N) return;
    const Values* from = reinterpret_cast<const Values*>(outliers.values) + j * row_vectors;
    Elements* to = reinterpret_cast<Elements*>(dense) + n * row_vectors;
    for (int64_t vector = int64_t(blockIdx.y) * blockDim.x + threadIdx.x; vector < row_vectors;
         vector += int64_t(gridDim.y) * blockDim.x) {
        const auto values = load<Values>(from + vector);
        Elements elements{};
        if (accumulate) elements = load<Elements>(to + vector);
#pragma unroll
        for (int i = 0; i < kValues; ++i) elements.at[i] = written(elements.at[i], values.at[i], accumulate);
        store(to + vector, elements);
    }
}

template <typename T>
void scatter_outlier_to(MutableMatrix dense, const Outliers& outliers, bool accumulate, Stream stream) {
    T* to = static_cast<T*>(dense.data);
    if (outliers.axis == 1) {
        launch("scatter_columns_kernel", scatter_columns_kernel<T>, row_grid(dense.rows, outliers.r, stream), to,
               dense.rows, dense.cols, outliers, accumulate);
        return;
    }
    const bool is_wide =
        dense.cols % kQuad == 0 && is_aligned(to, kQuad * sizeof(T)) && is_aligned(outliers.values, kVectorBytes);
    const int64_t vectors = is_wide ? dense.cols / kQuad : dense.cols;
    launch("scatter_rows_kernel", is_wide ? scatter_rows_kernel<T, kQuad> : scatter_rows_kernel<T, 1>,
           row_grid(outliers.r, vectors, stream), to, dense.rows, vectors, outliers, accumulate);
}

}  // namespace

void scatter_outlier_(MutableMatrix dense, Outliers outliers, bool accumulate, Stream stream) {
    if (dense.rows == 0 || dense.cols == 0 || outliers.r == 0) return;
    switch (dense.dtype) {
        case Dtype::float32: return scatter_outlier_to<float>(dense, outliers, accumulate, stream);
        case Dtype::float16: return scatter_outlier_to<__half>(dense, outliers, accumulate, stream);
        case Dtype::bfloat16: return scatter_outlier_to<__nv_bfloat16>(dense, outliers, accumulate, stream);
    }
}

}  // namespace prequant::cuda
