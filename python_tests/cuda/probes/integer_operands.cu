// What unpacking codes for the integer product costs, as words.cu for the 16-bit floats.
#include "../../../csrc/cuda/integer_operands.cuh"

namespace prequant::cuda {

template <int kContainer, int kCount>
__global__ void integer_operands_kernel(const LaneCodes<kContainer>* __restrict__ codes,
                                        ChunkOperands* __restrict__ out) {
    LaneCodes<kContainer> mine[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) mine[i] = codes[threadIdx.x * kCount + i];
#pragma unroll
    for (int i = 0; i < kCount; ++i) out[i] = unpack_chunk<kContainer>(mine[i]);
}

template __global__ void integer_operands_kernel<4, 4>(const LaneCodes<4>* __restrict__, ChunkOperands* __restrict__);
template __global__ void integer_operands_kernel<4, 8>(const LaneCodes<4>* __restrict__, ChunkOperands* __restrict__);

}  // namespace prequant::cuda
