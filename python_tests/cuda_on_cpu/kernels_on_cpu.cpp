// The storage kernels' own source, as C functions for ctypes.
#include "../../csrc/cuda/dequantize.cu"
#include "../../csrc/cuda/pack.cu"

using namespace prequant;

extern "C" {

void run_pack(const uint8_t* codes, int64_t N, int64_t K, int container, uint8_t* packed) { cuda::pack(codes, N, K, container, packed, nullptr); }

void run_unpack(const uint8_t* packed, int64_t N, int64_t K, int container, uint8_t* codes) { cuda::unpack(packed, N, K, container, codes, nullptr); }

void run_dequantize(const uint8_t* packed, const float* scale, const uint8_t* zero_point, int64_t N, int64_t K, int64_t scale_rows, int64_t G, int container,
                    int64_t row_begin, int64_t rows, int dtype, void* dense) {
    cuda::dequantize({packed, scale, zero_point, N, K, scale_rows, G, container}, row_begin, {dense, static_cast<Dtype>(dtype), rows, K}, nullptr);
}
}
