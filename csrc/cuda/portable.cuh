// What kernels need of CUDA, under names that g++ can stand in for: a test runs the same .cu files on the CPU.
#pragma once

#ifdef __CUDACC__
#include <cuda_runtime.h>
#else
#include "cuda_on_cpu.h"  // threadIdx and its kin, and run_grid(); tests only, never in the library
#endif
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "../kernels.h"

namespace prequant::cuda {

struct LaunchConfig {
    dim3 grid, block;
    Stream stream = nullptr;
    size_t shared_bytes = 0;
};

// kernel<<<config>>>(arguments...), with the parameters' types checked; a launch that CUDA refuses throws and names the kernel.
template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), const LaunchConfig& config, Arguments... arguments) {
#ifdef __CUDACC__
    cudaLaunchConfig_t launch_config{};
    launch_config.gridDim = config.grid;
    launch_config.blockDim = config.block;
    launch_config.dynamicSmemBytes = config.shared_bytes;
    launch_config.stream = static_cast<cudaStream_t>(config.stream);
    cudaError_t error = cudaLaunchKernelEx(&launch_config, kernel, static_cast<Parameters>(arguments)...);
    // Also takes the error off the record: left there, the next launch would be blamed for it.
    const cudaError_t recorded = cudaGetLastError();
    if (error == cudaSuccess) error = recorded;
    if (error != cudaSuccess)
        throw std::runtime_error(std::string(name) + ": CUDA could not launch the kernel: " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")");
#else
    (void)name;
    run_grid(config.grid, config.block, [&] { kernel(static_cast<Parameters>(arguments)...); });
#endif
}

// kCount values that one instruction loads or stores; the address must be a multiple of their size together.
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Vector {
    T at[kCount];
};

template <typename T>
PREQUANT_HOST_DEVICE inline T load(const void* address) {
    return *static_cast<const T*>(address);
}

template <typename T>
PREQUANT_HOST_DEVICE inline void store(void* address, const T& value) {
    *static_cast<T*>(address) = value;
}

constexpr int kVectorBytes = 16;  // the widest access of one thread

inline bool is_aligned(const void* address, int64_t bytes) { return reinterpret_cast<uintptr_t>(address) % bytes == 0; }

template <typename T>
PREQUANT_HOST_DEVICE inline T from_float(float value);
template <>
PREQUANT_HOST_DEVICE inline float from_float<float>(float value) {
    return value;
}
template <>
PREQUANT_HOST_DEVICE inline __half from_float<__half>(float value) {
    return __float2half_rn(value);
}
template <>
PREQUANT_HOST_DEVICE inline __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
    return __float2bfloat16_rn(value);
}

// ---- a grid over the rows of a matrix, each cut into chunks ----
//
//   row n = blockIdx.x * blockDim.y + threadIdx.y           grid.x alone reaches 2^31 - 1 blocks, so it carries the rows
//   chunk c = blockIdx.y * blockDim.x + threadIdx.x, then on by gridDim.y * blockDim.x, because gridDim.y ends at 65535
//
// Neighbouring lanes take neighbouring chunks, so their accesses coalesce; a short row shares its block with the next rows.
inline LaunchConfig row_grid(int64_t rows, int64_t chunks, Stream stream) {
    constexpr int64_t kThreads = 256, kWarp = 32, kMaxGridX = 2147483647, kMaxGridY = 65535;
    const int64_t across = std::min(kThreads, ceil_div(chunks, kWarp) * kWarp), down = kThreads / across;
    if (ceil_div(rows, down) > kMaxGridX)
        throw std::runtime_error("a CUDA launch covers at most " + std::to_string(kMaxGridX * down) + " rows, got " + std::to_string(rows));
    return {.grid = dim3(static_cast<unsigned>(ceil_div(rows, down)), static_cast<unsigned>(std::min(ceil_div(chunks, across), kMaxGridY))),
            .block = dim3(static_cast<unsigned>(across), static_cast<unsigned>(down)),
            .stream = stream};
}

}  // namespace prequant::cuda
