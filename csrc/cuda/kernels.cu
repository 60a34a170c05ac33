// The table of CUDA kernels. An operator that has none stays null: ops.h refuses it on this device and says so.
#include <cuda_runtime_api.h>

#include "cuda.h"

#define PREQUANT_QUOTE(x) #x
#define PREQUANT_TEXT(x) PREQUANT_QUOTE(x)

namespace prequant {

const Kernels& cuda_kernels() {
    static const Kernels kernels = [] {
        Kernels table{};
        table.pack = &cuda::pack;
        table.unpack = &cuda::unpack;
        table.dequantize = &cuda::dequantize;
        return table;
    }();
    return kernels;
}

namespace cuda {

const char* toolkit_version() {
    static_assert(CUDART_VERSION >= 12000, "C++20 device code needs nvcc 12 or newer");
    return PREQUANT_TEXT(__CUDACC_VER_MAJOR__) "." PREQUANT_TEXT(__CUDACC_VER_MINOR__);
}

const char* architectures() { return PREQUANT_CUDA_ARCHITECTURES; }

}  // namespace cuda

}  // namespace prequant
