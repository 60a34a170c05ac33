// What the dequantization of words.cuh costs: kernels that do nothing else. test_cuda_gate.py compares the SASS of 8
// with that of 4 lanes' codes, so that constants and addresses, which a loop computes once, do not count.
#include "../../../csrc/cuda/words.cuh"

namespace prequant::cuda {

template <typename T, int kContainer, bool kTransposed, int kCount>
__global__ void words_kernel(const LaneCodes<kContainer>* __restrict__ codes, const ZeroPoints* __restrict__ zeros,
                             Registers* __restrict__ out) {
    const ZeroPoints zero = zeros[threadIdx.x];  // in registers, as in the kernels
    LaneCodes<kContainer> mine[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) mine[i] = codes[threadIdx.x * kCount + i];
#pragma unroll
    for (int i = 0; i < kCount; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const TileCodes<kContainer> tile = tile_codes<kContainer>(mine[i], j);
            out[4 * i + j] = registers_of<T, kContainer>(kTransposed ? transposed<kContainer>(tile) : tile, zero);
        }
}

#define INSTANTIATE(T, kContainer, kTransposed)                                                              \
    template __global__ void words_kernel<T, kContainer, kTransposed, 4>(                                    \
        const LaneCodes<kContainer>* __restrict__, const ZeroPoints* __restrict__, Registers* __restrict__); \
    template __global__ void words_kernel<T, kContainer, kTransposed, 8>(                                    \
        const LaneCodes<kContainer>* __restrict__, const ZeroPoints* __restrict__, Registers* __restrict__);
INSTANTIATE(__half, 4, false)
INSTANTIATE(__half, 4, true)
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
INSTANTIATE(__nv_bfloat16, 4, false)
INSTANTIATE(__nv_bfloat16, 4, true)
#endif

}  // namespace prequant::cuda
