// The PTX instructions of the kernels, one function each; under g++ the emulator's.
//
// Fragments of an mma (lane = 4 g + q; a register holds consecutive elements along k, the first one in its lowest
// bits):
//
//              16-bit operands                              8-bit operands
//   A, reg r   row g + 8 (r % 2), k = 8 (r / 2) + 2q ..+1   row g + 8 (r % 2), k = 16 (r / 2) + 4q ..+3
//   B, reg r   column g,          k = 8 r + 2q ..+1         column g,          k = 16 r + 4q ..+3
//   D, reg r   row g + 8 (r / 2), column 2q + r % 2         the same
//
// sm_75 has neither cp.async nor the large shapes: there a copy is plain and a product is made of several smaller ones.
// It has no bfloat16 at all; operators refuse it before a kernel is launched.
#pragma once

#include "portable.cuh"

namespace prequant::cuda {

#ifdef __CUDACC__
#define PREQUANT_PTX __device__ __forceinline__
#else
#define PREQUANT_PTX PREQUANT_ALWAYS_INLINE
#endif

PREQUANT_PTX uint32_t shared_address(const void* address) {
#ifdef __CUDACC__
    return static_cast<uint32_t>(__cvta_generic_to_shared(address));
#else
    return emulator::shared_offset(address);
#endif
}

// ---- cp.async: 16 bytes from global to shared memory, past the registers ----

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
PREQUANT_PTX void copy_now_16(void* shared_to, const void* from, int source_bytes) {
    uint4 value = make_uint4(0, 0, 0, 0);
    if (source_bytes == 16) {
        value = *static_cast<const uint4*>(from);
    } else {
        unsigned words[4] = {0, 0, 0, 0};
#pragma unroll
        for (int i = 0; i < 16; ++i)
            if (i < source_bytes)
                words[i / 4] |= static_cast<unsigned>(static_cast<const uint8_t*>(from)[i]) << (i % 4 * 8);
        value = make_uint4(words[0], words[1], words[2], words[3]);
    }
    *static_cast<uint4*>(shared_to) = value;
}
#endif

// Copies the first source_bytes and fills the rest of the 16 with zeros; with 0, `from` is not read.
PREQUANT_PTX void cp_async_16(void* shared_to, const void* from, int source_bytes = 16) {
#if !defined(__CUDACC__)
    emulator::cp_async_16(shared_to, from, source_bytes);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
    copy_now_16(shared_to, from, source_bytes);
#else
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared_to)), "l"(from),
                 "r"(source_bytes)
                 : "memory");
#endif
}

// The same for what is read once, a weight: its lines are the first that L2 gives up.
PREQUANT_PTX void cp_async_16_evict_first(void* shared_to, const void* from, int source_bytes = 16) {
#if !defined(__CUDACC__)
    emulator::cp_async_16(shared_to, from, source_bytes);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
    copy_now_16(shared_to, from, source_bytes);
#else
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;\n" : "=l"(policy));
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;\n" ::"r"(shared_address(shared_to)),
                 "l"(from), "r"(source_bytes), "l"(policy)
                 : "memory");
#endif
}

// Ends the group of the copies since the last commit.
PREQUANT_PTX void cp_async_commit() {
#if !defined(__CUDACC__)
    emulator::cp_async_commit();
#elif !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;\n" ::: "memory");
#endif
}

// Waits for all of this thread's groups but the newest kGroups; other threads' copies need a barrier after it.
template <int kGroups>
PREQUANT_PTX void cp_async_wait() {
#if !defined(__CUDACC__)
    emulator::cp_async_wait(kGroups);
#elif !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;\n" ::"n"(kGroups) : "memory");
#endif
}

// ---- 8 x 8 matrices of 16-bit elements ----
//
// A register holds elements (g, 2q) and (g, 2q + 1), after transposing where the name says so. Lane 8 m + i gives the
// address of row i of matrix m, 16 bytes of shared memory; x2 reads the addresses of lanes 0 to 15 alone.

PREQUANT_PTX void ldmatrix_x4(uint32_t (&registers)[4], const void* row) {
#ifdef __CUDACC__
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(shared_address(row))
                 : "memory");
#else
    emulator::ldmatrix(registers, 4, false, row);
#endif
}

PREQUANT_PTX void ldmatrix_x4_trans(uint32_t (&registers)[4], const void* row) {
#ifdef __CUDACC__
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(shared_address(row))
                 : "memory");
#else
    emulator::ldmatrix(registers, 4, true, row);
#endif
}

PREQUANT_PTX void ldmatrix_x2(uint32_t (&registers)[2], const void* row) {
#ifdef __CUDACC__
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];\n"
                 : "=r"(registers[0]), "=r"(registers[1])
                 : "r"(shared_address(row))
                 : "memory");
#else
    emulator::ldmatrix(registers, 2, false, row);
#endif
}

PREQUANT_PTX void ldmatrix_x2_trans(uint32_t (&registers)[2], const void* row) {
#ifdef __CUDACC__
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];\n"
                 : "=r"(registers[0]), "=r"(registers[1])
                 : "r"(shared_address(row))
                 : "memory");
#else
    emulator::ldmatrix(registers, 2, true, row);
#endif
}

// Transposes one matrix that lies in the registers of a warp.
PREQUANT_PTX uint32_t movmatrix_trans(uint32_t value) {
#ifdef __CUDACC__
    uint32_t transposed;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;\n" : "=r"(transposed) : "r"(value));
    return transposed;
#else
    return emulator::movmatrix_trans(value);
#endif
}

// ---- D += A B on tensor cores: 16-bit floats, summed in float32 ----

PREQUANT_PTX void mma_m16n8k8(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b) {
#ifdef __CUDACC__
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(b));
#else
    const uint32_t a[2] = {a0, a1};
    emulator::mma_float(emulator::Operand::half, 8, d, a, &b);
#endif
}

template <typename T>
PREQUANT_PTX void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
PREQUANT_PTX void mma_m16n8k16<__half>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if !defined(__CUDACC__)
    emulator::mma_float(emulator::Operand::half, 16, d, a, b);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
    mma_m16n8k8(d, a[0], a[1], b[0]);
    mma_m16n8k8(d, a[2], a[3], b[1]);
#else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

template <>
PREQUANT_PTX void mma_m16n8k16<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if !defined(__CUDACC__)
    emulator::mma_float(emulator::Operand::bfloat16, 16, d, a, b);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
    __trap();
#else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
        "%2, %3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// ---- D += A B on tensor cores: bytes, summed exactly (modulo 2^32) in int32 ----
//
// The names give the signedness of A and of B.

PREQUANT_PTX void mma_m8n8k16_s8u8(int32_t& d0, int32_t& d1, uint32_t a, uint32_t b) {
#ifdef __CUDACC__
    asm volatile("mma.sync.aligned.m8n8k16.row.col.s32.s8.u8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};\n"
                 : "+r"(d0), "+r"(d1)
                 : "r"(a), "r"(b));
#else
    int32_t d[2] = {d0, d1};
    emulator::mma_int8_m8n8k16(true, d, &a, &b);
    d0 = d[0], d1 = d[1];
#endif
}

PREQUANT_PTX void mma_m8n8k16_u8s8(int32_t& d0, int32_t& d1, uint32_t a, uint32_t b) {
#ifdef __CUDACC__
    asm volatile("mma.sync.aligned.m8n8k16.row.col.s32.u8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};\n"
                 : "+r"(d0), "+r"(d1)
                 : "r"(a), "r"(b));
#else
    int32_t d[2] = {d0, d1};
    emulator::mma_int8_m8n8k16(false, d, &a, &b);
    d0 = d[0], d1 = d[1];
#endif
}

PREQUANT_PTX void mma_m16n8k32_s8u8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if !defined(__CUDACC__)
    emulator::mma_int8_m16n8k32(true, d, a, b);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
    mma_m8n8k16_s8u8(d[0], d[1], a[0], b[0]);
    mma_m8n8k16_s8u8(d[2], d[3], a[1], b[0]);
    mma_m8n8k16_s8u8(d[0], d[1], a[2], b[1]);
    mma_m8n8k16_s8u8(d[2], d[3], a[3], b[1]);
#else
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};\n"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

PREQUANT_PTX void mma_m16n8k32_u8s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if !defined(__CUDACC__)
    emulator::mma_int8_m16n8k32(false, d, a, b);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
    mma_m8n8k16_u8s8(d[0], d[1], a[0], b[0]);
    mma_m8n8k16_u8s8(d[2], d[3], a[1], b[0]);
    mma_m8n8k16_u8s8(d[0], d[1], a[2], b[1]);
    mma_m8n8k16_u8s8(d[2], d[3], a[3], b[1]);
#else
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};\n"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// ---- bits ----

// Any function of three bits: kTable is it applied to a = 0xf0, b = 0xcc, c = 0xaa. (a & b) | c is (0xf0 & 0xcc) |
// 0xaa.
template <int kTable>
PREQUANT_PTX uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
#ifdef __CUDACC__
    uint32_t result;
    asm("lop3.b32 %0, %1, %2, %3, %4;\n" : "=r"(result) : "r"(a), "r"(b), "r"(c), "n"(kTable));
    return result;
#else
    uint32_t result = 0;
    for (int i = 0; i < 8; ++i)
        if (kTable >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
    return result;
#endif
}

// Byte i of the result is byte (nibble i of selector) of the eight bytes {b, a}, a the lower four.
PREQUANT_PTX uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) { return __byte_perm(a, b, selector); }

}  // namespace prequant::cuda
