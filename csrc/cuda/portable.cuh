// What kernels need of CUDA, under names that g++ can stand in for: tests run the same .cu files on the CPU, by
// ../emulator.
//
// A kernel file keeps to four rules: launch() instead of <<<>>>; dynamic_shared<T>() and PREQUANT_SHARED(name, type)
// instead of __shared__; load() and store() for accesses wider than one number; PTX through ptx.cuh.
#pragma once

#ifdef __CUDACC__
#include <cuda_runtime.h>
#else
#include "../emulator/emulator.h"
#endif
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "../kernels.h"

namespace prequant::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;  // the mask of a whole warp
constexpr int64_t kMaxGridX = 2147483647, kMaxGridY = 65535;

struct LaunchConfig {
    dim3 grid, block;
    Stream stream = {};
    size_t shared_bytes = 0;  // of dynamic_shared
};

// kernel<<<config>>>(arguments...), with the parameters' types checked; a launch that CUDA refuses throws and names the
// kernel.
template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), const LaunchConfig& config, Arguments... arguments) {
#ifdef __CUDACC__
    const auto check = [name](cudaError_t error) {
        if (error == cudaSuccess) return;
        cudaGetLastError();  // takes the error off the record: left there, the next launch would be blamed for it
        throw std::runtime_error(std::string(name) + ": CUDA could not launch the kernel: " +
                                 cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")");
    };
    // A block gets more shared memory only where the kernel has been marked for it.
    constexpr size_t kUnasked = 48 * 1024;
    if (config.shared_bytes > kUnasked)
        check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(config.shared_bytes)));
    cudaLaunchConfig_t launch_config{};
    launch_config.gridDim = config.grid;
    launch_config.blockDim = config.block;
    launch_config.dynamicSmemBytes = config.shared_bytes;
    launch_config.stream = static_cast<cudaStream_t>(config.stream.handle);
    check(cudaLaunchKernelEx(&launch_config, kernel, static_cast<Parameters>(arguments)...));
    check(cudaPeekAtLastError());
#else
    emulator::launch(name, config.grid, config.block, config.shared_bytes,
                     [&] { kernel(static_cast<Parameters>(arguments)...); });
#endif
}

// ---- shared memory ----
//
//   T* tile = dynamic_shared<T>();             the launch's shared_bytes, 128-byte aligned
//   PREQUANT_SHARED(sums, float[32]);          a static variable of the block
#ifdef __CUDACC__
template <typename T>
using SharedType = T;
#define PREQUANT_SHARED(name, ...) __shared__::prequant::cuda::SharedType<__VA_ARGS__> name

template <typename T>
__device__ __forceinline__ T* dynamic_shared() {
    extern __shared__ __align__(128) unsigned char prequant_dynamic_shared[];
    return reinterpret_cast<T*>(prequant_dynamic_shared);
}
#else
// The key is one for each line of the source and each instantiation of its kernel.
#define PREQUANT_SHARED(name, ...)                                                                             \
    std::remove_reference_t<__VA_ARGS__>& name = *static_cast<std::add_pointer_t<__VA_ARGS__>>([]() -> void* { \
        static const char key = 0;                                                                             \
        return ::prequant::emulator::static_shared(&key, sizeof(__VA_ARGS__), alignof(__VA_ARGS__));           \
    }())

template <typename T>
T* dynamic_shared() {
    return static_cast<T*>(emulator::dynamic_shared());
}
#endif

// ---- memory and numbers ----

// kCount values that one instruction loads or stores; the address must be a multiple of their size together.
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Vector {
    T at[kCount];
};

// One access of sizeof(T) bytes.
#ifdef __CUDACC__
template <typename T>
__device__ __forceinline__ T load(const void* address) {
    return *static_cast<const T*>(address);
}

template <typename T>
__device__ __forceinline__ void store(void* address, const T& value) {
    *static_cast<T*>(address) = value;
}
#else
template <typename T>
PREQUANT_ALWAYS_INLINE T load(const void* address) {
    return emulator::load(static_cast<const T*>(address));
}

template <typename T>
PREQUANT_ALWAYS_INLINE void store(void* address, const T& value) {
    emulator::store(static_cast<T*>(address), value);
}
#endif

constexpr int kVectorBytes = 16;  // the widest access of one thread
constexpr int kQuad = 4;          // neighbouring numbers of a row that a thread takes together

// 2^23: the lowest bits of such a float are an integer, so that kCodeBiasBits | code is kCodeBias + code, exactly.
constexpr float kCodeBias = 8388608;
constexpr uint32_t kCodeBiasBits = 0x4b000000;

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

PREQUANT_HOST_DEVICE inline float to_float(float value) { return value; }
PREQUANT_HOST_DEVICE inline float to_float(__half value) { return __half2float(value); }
PREQUANT_HOST_DEVICE inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

// A grid of so many blocks along x, or an error.
inline dim3 grid_of(const char* name, int64_t blocks) {
    if (blocks > kMaxGridX)
        throw std::runtime_error(std::string(name) + ": needs " + std::to_string(blocks) +
                                 " blocks, a CUDA launch has at most " + std::to_string(kMaxGridX));
    return dim3(static_cast<unsigned>(blocks));
}

// ---- a grid over the rows of a matrix, each cut into vectors ----
//
//   row n = blockIdx.x * blockDim.y + threadIdx.y       grid.x alone reaches 2^31 - 1 blocks, so it carries the rows
//   vector v = blockIdx.y * blockDim.x + threadIdx.x,   then on by gridDim.y * blockDim.x, because gridDim.y ends at
//                                                       65535
//
// A vector is what one access of a thread moves: several numbers, or a single one where a row is not aligned.
// Neighbouring lanes take neighbouring vectors, so their accesses coalesce; a short row shares its block with the next
// rows.
inline LaunchConfig row_grid(int64_t rows, int64_t vectors, Stream stream) {
    constexpr int64_t kThreads = 256;
    const int64_t across = std::min(kThreads, ceil_div(vectors, kWarp) * kWarp), down = kThreads / across;
    if (ceil_div(rows, down) > kMaxGridX)
        throw std::runtime_error("a CUDA launch covers at most " + std::to_string(kMaxGridX * down) + " rows, got " +
                                 std::to_string(rows));
    return {.grid = dim3(static_cast<unsigned>(ceil_div(rows, down)),
                         static_cast<unsigned>(std::min(ceil_div(vectors, across), kMaxGridY))),
            .block = dim3(static_cast<unsigned>(across), static_cast<unsigned>(down)),
            .stream = stream};
}

}  // namespace prequant::cuda
