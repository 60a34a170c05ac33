// The table of CUDA kernels. An operator that has none stays null: ops.h refuses it on this device and says so.
#ifndef PREQUANT_EMULATED
#include <cuda_runtime_api.h>
#endif

#include "cuda.h"
#include "dispatch.h"

#define PREQUANT_QUOTE(x) #x
#define PREQUANT_TEXT(x) PREQUANT_QUOTE(x)

namespace prequant {

#ifdef PREQUANT_EMULATED
#define cuda_kernels emulated_kernels
const Kernels& emulated_kernels();
#endif

const Kernels& cuda_kernels() {
    static const Kernels kernels = [] {
        Kernels table{};
        table.linear_reads_prepacked = true;
        table.prefers_dense = &cuda::prefers_dense;
        table.weight_stats = &cuda::weight_stats;
        table.outlier_counts = &cuda::outlier_counts;
        table.select_outlier_dims = &cuda::select_outlier_dims;
        table.quantize_pack = &cuda::quantize_pack;
        table.pack = &cuda::pack;
        table.unpack = &cuda::unpack;
        table.prepack = &cuda::prepack;
        table.unprepack = &cuda::unprepack;
        table.dequantize = &cuda::dequantize;
        table.scatter_outlier_ = &cuda::scatter_outlier_;
        table.embedding = &cuda::embedding;
        table.quantize_activations = &cuda::quantize_activations;
        table.linear_w4a16 = &cuda::linear_w4a16;
        table.linear_w4a8 = &cuda::linear_w4a8;
        table.linear_dx = &cuda::linear_dx;
        table.outlier_grad = &cuda::outlier_grad;
        table.scale_grad = &cuda::scale_grad;
        return table;
    }();
    return kernels;
}

namespace cuda {

#ifdef PREQUANT_EMULATED
const char* toolkit_version() { return "emulated"; }
const char* architectures() { return "emulated"; }
#else
const char* toolkit_version() {
    static_assert(CUDART_VERSION >= 12000, "C++20 device code needs nvcc 12 or newer");
    return PREQUANT_TEXT(__CUDACC_VER_MAJOR__) "." PREQUANT_TEXT(__CUDACC_VER_MINOR__);
}

const char* architectures() { return PREQUANT_CUDA_ARCHITECTURES; }
#endif

}  // namespace cuda

}  // namespace prequant
