// One small kernel for each wrapper of ../cuda/ptx.cuh: a test holds it against the PTX manual, in the emulator and,
// compiled by nvcc, on a GPU.
//
// One warp. Lane l's registers are words l, 32 + l, 64 + l, ... of `in`, in the order of the wrapper's arguments (D, A,
// B for a product); its results are the same words of `out`. The kernels on shared memory first copy `in` there, as 32
// rows of 16 bytes.
#include <cstring>
#include <type_traits>

#include "../cuda/ptx.cuh"

namespace prequant::cuda {

namespace {

using Kernel = void (*)(const uint32_t*, uint32_t*);

__device__ inline uint32_t bits_of(float value) { return __float_as_uint(value); }
__device__ inline uint32_t bits_of(int32_t value) { return static_cast<uint32_t>(value); }

template <typename T>
__device__ inline T from_bits(uint32_t bits) {
    if constexpr (std::is_same_v<T, float>) {
        return __uint_as_float(bits);
    } else {
        return static_cast<T>(bits);
    }
}

// Every product: multiply(d, a, b) on T d[kD], uint32_t a[kA], b[kB].
template <typename T, int kD, int kA, int kB, typename Multiply>
__device__ inline void product(const uint32_t* in, uint32_t* out, Multiply multiply) {
    const int lane = threadIdx.x;
    T d[kD];
    uint32_t a[kA], b[kB];
    for (int i = 0; i < kD; ++i) d[i] = from_bits<T>(in[i * 32 + lane]);
    for (int i = 0; i < kA; ++i) a[i] = in[(kD + i) * 32 + lane];
    for (int i = 0; i < kB; ++i) b[i] = in[(kD + kA + i) * 32 + lane];
    multiply(d, a, b);
    for (int i = 0; i < kD; ++i) out[i * 32 + lane] = bits_of(d[i]);
}

template <typename T>
__global__ void mma_m16n8k16_kernel(const uint32_t* in, uint32_t* out) {
    product<float, 4, 4, 2>(in, out,
                            [](float (&d)[4], uint32_t (&a)[4], uint32_t (&b)[2]) { mma_m16n8k16<T>(d, a, b); });
}

__global__ void mma_m16n8k8_kernel(const uint32_t* in, uint32_t* out) {
    product<float, 4, 2, 1>(
        in, out, [](float (&d)[4], uint32_t (&a)[2], uint32_t (&b)[1]) { mma_m16n8k8(d, a[0], a[1], b[0]); });
}

__global__ void mma_m16n8k32_s8u8_kernel(const uint32_t* in, uint32_t* out) {
    product<int32_t, 4, 4, 2>(in, out,
                              [](int32_t (&d)[4], uint32_t (&a)[4], uint32_t (&b)[2]) { mma_m16n8k32_s8u8(d, a, b); });
}

__global__ void mma_m16n8k32_u8s8_kernel(const uint32_t* in, uint32_t* out) {
    product<int32_t, 4, 4, 2>(in, out,
                              [](int32_t (&d)[4], uint32_t (&a)[4], uint32_t (&b)[2]) { mma_m16n8k32_u8s8(d, a, b); });
}

__global__ void mma_m8n8k16_s8u8_kernel(const uint32_t* in, uint32_t* out) {
    product<int32_t, 2, 1, 1>(
        in, out, [](int32_t (&d)[2], uint32_t (&a)[1], uint32_t (&b)[1]) { mma_m8n8k16_s8u8(d[0], d[1], a[0], b[0]); });
}

__global__ void mma_m8n8k16_u8s8_kernel(const uint32_t* in, uint32_t* out) {
    product<int32_t, 2, 1, 1>(
        in, out, [](int32_t (&d)[2], uint32_t (&a)[1], uint32_t (&b)[1]) { mma_m8n8k16_u8s8(d[0], d[1], a[0], b[0]); });
}

// load(registers, row) on the 32 rows; lane l gives the address of row l.
template <int kRegisters, typename Load>
__device__ inline void load_matrices(const uint32_t* in, uint32_t* out, Load load) {
    PREQUANT_SHARED(rows, uint4[32]);
    const int lane = threadIdx.x;
    rows[lane] = make_uint4(in[lane * 4], in[lane * 4 + 1], in[lane * 4 + 2], in[lane * 4 + 3]);
    __syncwarp();
    uint32_t registers[kRegisters];
    load(registers, &rows[lane]);
    for (int i = 0; i < kRegisters; ++i) out[i * 32 + lane] = registers[i];
}

__global__ void ldmatrix_x4_kernel(const uint32_t* in, uint32_t* out) {
    load_matrices<4>(in, out, [](uint32_t (&registers)[4], const void* row) { ldmatrix_x4(registers, row); });
}

__global__ void ldmatrix_x4_trans_kernel(const uint32_t* in, uint32_t* out) {
    load_matrices<4>(in, out, [](uint32_t (&registers)[4], const void* row) { ldmatrix_x4_trans(registers, row); });
}

__global__ void ldmatrix_x2_kernel(const uint32_t* in, uint32_t* out) {
    load_matrices<2>(in, out, [](uint32_t (&registers)[2], const void* row) { ldmatrix_x2(registers, row); });
}

__global__ void ldmatrix_x2_trans_kernel(const uint32_t* in, uint32_t* out) {
    load_matrices<2>(in, out, [](uint32_t (&registers)[2], const void* row) { ldmatrix_x2_trans(registers, row); });
}

__global__ void movmatrix_trans_kernel(const uint32_t* in, uint32_t* out) {
    out[threadIdx.x] = movmatrix_trans(in[threadIdx.x]);
}

__global__ void shared_address_kernel(const uint32_t*, uint32_t* out) {
    PREQUANT_SHARED(rows, uint4[32]);
    out[threadIdx.x] = shared_address(&rows[threadIdx.x]) - shared_address(&rows[0]);
}

// Row l, its first l / 2 bytes copied and the rest filled up, by the groups of the even and the odd lanes one after the
// other.
template <bool kEvictFirst>
__global__ void cp_async_kernel(const uint32_t* in, uint32_t* out) {
    uint32_t* rows = dynamic_shared<uint32_t>();
    const int lane = threadIdx.x;
    for (int group = 0; group < 2; ++group) {
        const void* from = lane < 2 ? nullptr : in + lane * 4;  // not read: no byte of it is asked for
        if (lane % 2 == group) {
            if (kEvictFirst) {
                cp_async_16_evict_first(rows + lane * 4, from, lane / 2);
            } else {
                cp_async_16(rows + lane * 4, from, lane / 2);
            }
        }
        cp_async_commit();
    }
    cp_async_wait<1>();
    if (lane % 2 == 0)
        for (int i = 0; i < 4; ++i) out[i * 32 + lane] = rows[lane * 4 + i];
    cp_async_wait<0>();
    if (lane % 2 == 1)
        for (int i = 0; i < 4; ++i) out[i * 32 + lane] = rows[lane * 4 + i];
}

__global__ void lop3_kernel(const uint32_t* in, uint32_t* out) {
    const uint32_t a = in[threadIdx.x], b = in[32 + threadIdx.x], c = in[64 + threadIdx.x];
    out[threadIdx.x] = lop3<0xea>(a, b, c);  // (a & b) | c
    out[32 + threadIdx.x] = lop3<0x96>(a, b, c);  // a ^ b ^ c
    out[64 + threadIdx.x] = lop3<0xca>(a, b, c);  // a ? b : c
    out[96 + threadIdx.x] = lop3<0x1b>(a, b, c);
}

__global__ void prmt_kernel(const uint32_t* in, uint32_t* out) {
    out[threadIdx.x] = prmt(in[threadIdx.x], in[32 + threadIdx.x], in[64 + threadIdx.x]);
}

// Intrinsics on the lane's words a, b, c, one row of results each. test_emulator.py has the same list.
__global__ void integer_intrinsics_kernel(const uint32_t* in, uint32_t* out) {
    const int lane = threadIdx.x;
    const uint32_t a = in[lane], b = in[32 + lane], c = in[64 + lane];
    const int sa = static_cast<int>(a), sb = static_cast<int>(b), sc = static_cast<int>(c);
    int row = 0;
    const auto put = [&](uint32_t value) { out[row++ * 32 + lane] = value; };
    put(__popc(a));
    put(__ffs(sa));
    put(__clz(sa));
    put(__dp4a(sa, sb, sc));
    put(__dp4a(a, b, c));
    put(__umulhi(a, b));
    put(__mulhi(sa, sb));
    put(__funnelshift_r(a, b, c));
    put(__funnelshift_l(a, b, c));
    put(min(sa, sb));
    put(max(a, b));
    put(__shfl_sync(0xffffffffu, a, sb));
    put(__shfl_xor_sync(0xffffffffu, a, 5));
    put(__shfl_down_sync(0xffffffffu, a, 3));
    put(__shfl_up_sync(0xffffffffu, a, 7));
    put(__shfl_xor_sync(0xffffffffu, a, 1, 8));
    put(__shfl_down_sync(0xffffffffu, a, 3, 8));
    put(__ballot_sync(0xffffffffu, a & 1));
    put(__any_sync(0xffffffffu, a == 0));
    put(__all_sync(0xffffffffu, a != 0));
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
    put(__reduce_add_sync(0xffffffffu, a));
    put(__reduce_max_sync(0xffffffffu, a));
    put(__reduce_min_sync(0xffffffffu, a));
#endif
}

// The same for floats x, y, z of any bits.
__global__ void float_intrinsics_kernel(const uint32_t* in, uint32_t* out) {
    const int lane = threadIdx.x;
    const float x = __uint_as_float(in[lane]), y = __uint_as_float(in[32 + lane]), z = __uint_as_float(in[64 + lane]);
    int row = 0;
    const auto put = [&](float value) { out[row++ * 32 + lane] = __float_as_uint(value); };
    const auto put_double = [&](double value) {
        const auto bits = static_cast<unsigned long long>(__double_as_longlong(value));
        out[row++ * 32 + lane] = static_cast<uint32_t>(bits);
        out[row++ * 32 + lane] = static_cast<uint32_t>(bits >> 32);
    };
    put(__fadd_rn(x, y));
    put(__fsub_rn(x, y));
    put(__fmul_rn(x, y));
    put(__fdiv_rn(x, y));
    put(__frcp_rn(x));
    put(__fsqrt_rn(fabsf(x)));
    put(__fmaf_rn(x, y, z));
    put(rintf(x));
    put(min(x, y));
    put(max(x, y));
    out[row++ * 32 + lane] = static_cast<uint32_t>(__float2int_rn(x));
    const double u = static_cast<double>(x) * 1.000000059604644775390625, v = y, w = static_cast<double>(z) / 3;
    put_double(__dadd_rn(u, v));
    put_double(__dsub_rn(u, v));
    put_double(__dmul_rn(u, w));
    put_double(__ddiv_rn(u, v));
    put_double(__dsqrt_rn(fabs(u)));
    put_double(__fma_rn(u, v, w));
    put_double(rint(u));
    out[row++ * 32 + lane] = static_cast<uint32_t>(__double2ll_rn(u) >> 16);
}

// The same for pairs of 16-bit floats of any bits.
template <typename T2>
__global__ void pair_intrinsics_kernel(const uint32_t* in, uint32_t* out) {
    const int lane = threadIdx.x;
    T2 x, y, z;
    memcpy(&x, &in[lane], 4);
    memcpy(&y, &in[32 + lane], 4);
    memcpy(&z, &in[64 + lane], 4);
    const auto put = [&](int row, T2 value) { memcpy(&out[row * 32 + lane], &value, 4); };
    put(0, __hadd2(x, y));
    put(1, __hsub2(x, y));
    put(2, __hmul2(x, y));
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
    if constexpr (!std::is_same_v<T2, __nv_bfloat162>)  // sm_75 knows no bfloat16
#endif
        put(3, __hfma2(x, y, z));
}

// out[0]: a count, out[1]: a sum, out[2], out[3]: the largest and the smallest of in.
__global__ void atomics_kernel(const uint32_t* in, uint32_t* out) {
    const int lane = threadIdx.x;
    if (lane == 0) out[0] = out[1] = out[2] = 0, out[3] = 0xffffffffu;
    __syncwarp();
    atomicAdd(&out[0], 1u);
    atomicAdd(reinterpret_cast<int*>(&out[1]), static_cast<int>(in[lane]));
    atomicMax(&out[2], in[lane]);
    atomicMin(&out[3], in[lane]);
}

const struct {
    const char* name;
    Kernel kernel;
} kKernels[] = {
    {"mma_m16n8k16_half", mma_m16n8k16_kernel<__half>},
    {"mma_m16n8k16_bfloat16", mma_m16n8k16_kernel<__nv_bfloat16>},
    {"mma_m16n8k8", mma_m16n8k8_kernel},
    {"mma_m16n8k32_s8u8", mma_m16n8k32_s8u8_kernel},
    {"mma_m16n8k32_u8s8", mma_m16n8k32_u8s8_kernel},
    {"mma_m8n8k16_s8u8", mma_m8n8k16_s8u8_kernel},
    {"mma_m8n8k16_u8s8", mma_m8n8k16_u8s8_kernel},
    {"ldmatrix_x4", ldmatrix_x4_kernel},
    {"ldmatrix_x4_trans", ldmatrix_x4_trans_kernel},
    {"ldmatrix_x2", ldmatrix_x2_kernel},
    {"ldmatrix_x2_trans", ldmatrix_x2_trans_kernel},
    {"movmatrix_trans", movmatrix_trans_kernel},
    {"shared_address", shared_address_kernel},
    {"cp_async_16", cp_async_kernel<false>},
    {"cp_async_16_evict_first", cp_async_kernel<true>},
    {"lop3", lop3_kernel},
    {"prmt", prmt_kernel},
    {"integer_intrinsics", integer_intrinsics_kernel},
    {"float_intrinsics", float_intrinsics_kernel},
    {"half2_intrinsics", pair_intrinsics_kernel<__half2>},
    {"bfloat162_intrinsics", pair_intrinsics_kernel<__nv_bfloat162>},
    {"atomics", atomics_kernel},
};

}  // namespace

}  // namespace prequant::cuda

// For ctypes. in and out: device memory, 16-byte aligned. Returns null, or what went wrong.
extern "C" __attribute__((visibility("default"))) const char* prequant_conformance(const char* name, const uint32_t* in,
                                                                                   uint32_t* out) {
    using namespace prequant::cuda;
    static thread_local std::string error;
    for (const auto& [known, kernel] : kKernels) {
        if (std::strcmp(known, name) != 0) continue;
        try {
            launch(known, kernel, {.grid = dim3(1), .block = dim3(32), .shared_bytes = 512}, in, out);
#ifdef __CUDACC__
            const cudaError_t status = cudaDeviceSynchronize();
            if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
#endif
            return nullptr;
        } catch (const std::exception& failure) {
            error = failure.what();
            return error.c_str();
        }
    }
    error = std::string("no conformance kernel is named ") + name;
    return error.c_str();
}
