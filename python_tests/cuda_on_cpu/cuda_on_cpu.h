// Stands in for CUDA's runtime so that g++ compiles a .cu file: a grid runs as nested loops, one thread after the other.
// Enough for kernels whose threads do not talk to each other. Types come from CUDA's own headers.
#pragma once

#include <vector_types.h>

#include <cstdint>

#undef __global__
#define __global__

inline thread_local dim3 gridDim, blockDim;
inline thread_local uint3 blockIdx, threadIdx;

template <typename Thread>
void run_grid(dim3 grid, dim3 block, Thread thread) {
    gridDim = grid;
    blockDim = block;
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
        for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x)
            for (threadIdx.y = 0; threadIdx.y < block.y; ++threadIdx.y)
                for (threadIdx.x = 0; threadIdx.x < block.x; ++threadIdx.x) thread();
}
