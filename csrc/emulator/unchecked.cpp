// Kernels by the addresses of their operands, past the host functions' checks: on a GPU indices in tensors are not read
// back, so that a kernel must live with any; and no operator shows the dense matrix of a prepacked weight.
#include <pybind11/pybind11.h>

#include "../kernels.h"

namespace prequant {

const Kernels& emulated_kernels();

namespace {

template <typename T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void dequantize_chunks(uintptr_t chunks, uintptr_t scale, uintptr_t zero_point, int64_t N, int64_t K,
                       int64_t scale_rows, int64_t G, int container, int64_t row_begin, int64_t rows, int dtype,
                       uintptr_t dense) {
    const Weight weight{at<const uint8_t>(chunks),
                        at<const float>(scale),
                        at<const uint8_t>(zero_point),
                        N,
                        K,
                        scale_rows,
                        G,
                        container,
                        true};
    emulated_kernels().dequantize(weight, row_begin, {at<void>(dense), static_cast<Dtype>(dtype), rows, K}, {});
}

void scatter_outlier(uintptr_t dense, int dtype, int64_t N, int64_t K, uintptr_t dims, uintptr_t values, int64_t r,
                     int axis, bool accumulate) {
    emulated_kernels().scatter_outlier_({at<void>(dense), static_cast<Dtype>(dtype), N, K},
                                        {at<const int64_t>(dims), at<const float>(values), r, axis}, accumulate, {});
}

void quantize_tokens(uintptr_t x, int dtype, int64_t M, int64_t K, uintptr_t excluded, int64_t size, uintptr_t codes,
                     uintptr_t scale, uintptr_t zero_point, uintptr_t sums) {
    emulated_kernels().quantize_activations({at<const void>(x), static_cast<Dtype>(dtype), M, K}, true, 1,
                                            at<const int64_t>(excluded), size, at<uint8_t>(codes), at<float>(scale),
                                            at<uint8_t>(zero_point), at<int32_t>(sums), {});
}

void embed(uintptr_t ids, uintptr_t codes, uintptr_t scale, uintptr_t zero_point, int64_t V, bool per_row,
           uintptr_t rows, int dtype, int64_t count, int64_t D) {
    emulated_kernels().embedding(at<const int64_t>(ids), at<const uint8_t>(codes), at<const float>(scale),
                                 at<const uint8_t>(zero_point), V, per_row,
                                 {at<void>(rows), static_cast<Dtype>(dtype), count, D}, {});
}

}  // namespace

void bind_unchecked(pybind11::module_& m) {
    m.def("dequantize_chunks", &dequantize_chunks);
    m.def("scatter_outlier", &scatter_outlier);
    m.def("embed", &embed);
    m.def("quantize_tokens", &quantize_tokens);
}

}  // namespace prequant
