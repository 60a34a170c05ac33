// CUDA's spelling of what kernels use: barriers, warp functions, atomics and the arithmetic intrinsics that CUDA's
// headers keep to nvcc. Each function rounds as the hardware's does; compile with -ffp-contract=off. What is missing
// here is missing on purpose (float atomics, __fdividef and its kin) or has had no use yet.
#pragma once

#include <bit>
#include <cmath>
#include <limits>

#include "emulator.h"

#define PREQUANT_DEVICE_FUNCTION static PREQUANT_ALWAYS_INLINE

static constexpr int warpSize = 32;

// ---- block and warp ----

#define __syncthreads() ::prequant::emulator::sync_threads()
#define __syncthreads_count(predicate) ::prequant::emulator::sync_threads_count((predicate) != 0)
#define __syncthreads_or(predicate) (::prequant::emulator::sync_threads_count((predicate) != 0) != 0)
PREQUANT_DEVICE_FUNCTION void __syncwarp(unsigned mask = 0xffffffffu) { prequant::emulator::sync_warp(mask); }
PREQUANT_DEVICE_FUNCTION void __threadfence() { prequant::emulator::thread_fence(); }
PREQUANT_DEVICE_FUNCTION void __threadfence_block() {}
#define __trap() ::prequant::emulator::fail("__trap at line %d of %s", __LINE__, __FILE__)

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int width = warpSize) {
    return prequant::emulator::shuffle(prequant::emulator::Shuffle::index, mask, value, lane, width);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = warpSize) {
    return prequant::emulator::shuffle(prequant::emulator::Shuffle::butterfly, mask, value, lanes, width);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = warpSize) {
    return prequant::emulator::shuffle(prequant::emulator::Shuffle::down, mask, value, static_cast<int>(by), width);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = warpSize) {
    return prequant::emulator::shuffle(prequant::emulator::Shuffle::up, mask, value, static_cast<int>(by), width);
}
PREQUANT_DEVICE_FUNCTION unsigned __ballot_sync(unsigned mask, int predicate) {
    return prequant::emulator::ballot(mask, predicate != 0);
}
PREQUANT_DEVICE_FUNCTION int __any_sync(unsigned mask, int predicate) {
    return prequant::emulator::ballot(mask, predicate != 0) != 0;
}
PREQUANT_DEVICE_FUNCTION int __all_sync(unsigned mask, int predicate) {
    return prequant::emulator::ballot(mask, predicate != 0) == mask;
}
template <typename T>
unsigned __match_any_sync(unsigned mask, T value) {
    static_assert(std::is_integral_v<T>);
    return prequant::emulator::match_any(mask, static_cast<uint64_t>(value));
}

#define PREQUANT_REDUCE(name, fold, T)                                                     \
    PREQUANT_DEVICE_FUNCTION T name(unsigned mask, T value) {                              \
        return prequant::emulator::reduce<T>(prequant::emulator::Fold::fold, mask, value); \
    }
PREQUANT_REDUCE(__reduce_add_sync, add, int)
PREQUANT_REDUCE(__reduce_add_sync, add, unsigned)
PREQUANT_REDUCE(__reduce_min_sync, min, int)
PREQUANT_REDUCE(__reduce_min_sync, min, unsigned)
PREQUANT_REDUCE(__reduce_max_sync, max, int)
PREQUANT_REDUCE(__reduce_max_sync, max, unsigned)
PREQUANT_REDUCE(__reduce_and_sync, bit_and, unsigned)
PREQUANT_REDUCE(__reduce_or_sync, bit_or, unsigned)
PREQUANT_REDUCE(__reduce_xor_sync, bit_xor, unsigned)
#undef PREQUANT_REDUCE

#define PREQUANT_ATOMIC(T)                                                                        \
    PREQUANT_DEVICE_FUNCTION T atomicAdd(T* address, T value) {                                   \
        return prequant::emulator::atomic_fold(prequant::emulator::Fold::add, address, value);    \
    }                                                                                             \
    PREQUANT_DEVICE_FUNCTION T atomicMin(T* address, T value) {                                   \
        return prequant::emulator::atomic_fold(prequant::emulator::Fold::min, address, value);    \
    }                                                                                             \
    PREQUANT_DEVICE_FUNCTION T atomicMax(T* address, T value) {                                   \
        return prequant::emulator::atomic_fold(prequant::emulator::Fold::max, address, value);    \
    }                                                                                             \
    PREQUANT_DEVICE_FUNCTION T atomicOr(T* address, T value) {                                    \
        return prequant::emulator::atomic_fold(prequant::emulator::Fold::bit_or, address, value); \
    }                                                                                             \
    PREQUANT_DEVICE_FUNCTION T atomicExch(T* address, T value) {                                  \
        return prequant::emulator::atomic_exchange(address, value);                               \
    }                                                                                             \
    PREQUANT_DEVICE_FUNCTION T atomicCAS(T* address, T expected, T value) {                       \
        return prequant::emulator::atomic_compare_and_swap(address, expected, value);             \
    }
PREQUANT_ATOMIC(int)
PREQUANT_ATOMIC(unsigned)
PREQUANT_ATOMIC(unsigned long long)
#undef PREQUANT_ATOMIC

// ---- loads and stores with a cache hint ----

template <typename T>
PREQUANT_ALWAYS_INLINE T __ldg(const T* address) {
    return prequant::emulator::load(address);
}
template <typename T>
PREQUANT_ALWAYS_INLINE T __ldcg(const T* address) {
    return prequant::emulator::load(address);
}
template <typename T>
PREQUANT_ALWAYS_INLINE T __ldcs(const T* address) {
    return prequant::emulator::load(address);
}
template <typename T>
PREQUANT_ALWAYS_INLINE void __stcg(T* address, T value) {
    prequant::emulator::store(address, value);
}
template <typename T>
PREQUANT_ALWAYS_INLINE void __stcs(T* address, T value) {
    prequant::emulator::store(address, value);
}

// ---- bits ----

PREQUANT_DEVICE_FUNCTION int __popc(unsigned value) { return __builtin_popcount(value); }
PREQUANT_DEVICE_FUNCTION int __popcll(unsigned long long value) { return __builtin_popcountll(value); }
PREQUANT_DEVICE_FUNCTION int __ffs(int value) { return __builtin_ffs(value); }
PREQUANT_DEVICE_FUNCTION int __ffsll(long long value) { return __builtin_ffsll(value); }
PREQUANT_DEVICE_FUNCTION int __clz(int value) { return std::countl_zero(static_cast<unsigned>(value)); }
PREQUANT_DEVICE_FUNCTION int __clzll(long long value) {
    return std::countl_zero(static_cast<unsigned long long>(value));
}
PREQUANT_DEVICE_FUNCTION unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
PREQUANT_DEVICE_FUNCTION int __float_as_int(float value) { return std::bit_cast<int>(value); }
PREQUANT_DEVICE_FUNCTION float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
PREQUANT_DEVICE_FUNCTION float __int_as_float(int bits) { return std::bit_cast<float>(bits); }
PREQUANT_DEVICE_FUNCTION long long __double_as_longlong(double value) { return std::bit_cast<long long>(value); }
PREQUANT_DEVICE_FUNCTION double __longlong_as_double(long long bits) { return std::bit_cast<double>(bits); }
PREQUANT_DEVICE_FUNCTION unsigned __umulhi(unsigned a, unsigned b) {
    return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}
PREQUANT_DEVICE_FUNCTION int __mulhi(int a, int b) { return static_cast<int>(static_cast<int64_t>(a) * b >> 32); }
PREQUANT_DEVICE_FUNCTION unsigned __funnelshift_r(unsigned low, unsigned high, unsigned by) {
    return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) >> (by & 31));
}
PREQUANT_DEVICE_FUNCTION unsigned __funnelshift_l(unsigned low, unsigned high, unsigned by) {
    return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) << (by & 31) >> 32);
}

// prmt: byte i of the result is byte (selector nibble i) of {y, x}; bit 3 of the nibble repeats that byte's sign
// instead.
PREQUANT_DEVICE_FUNCTION unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) {
        const unsigned choice = selector >> (4 * i) & 15;
        const auto byte = static_cast<uint8_t>(bytes >> (8 * (choice & 7)));
        result |= static_cast<unsigned>(choice & 8 ? (byte & 0x80 ? 0xff : 0) : byte) << (8 * i);
    }
    return result;
}

PREQUANT_DEVICE_FUNCTION int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 4; ++i) c += static_cast<int8_t>(a >> (8 * i)) * static_cast<int8_t>(b >> (8 * i));
    return c;
}
PREQUANT_DEVICE_FUNCTION unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
    for (int i = 0; i < 4; ++i)
        c += static_cast<unsigned>(static_cast<uint8_t>(a >> (8 * i))) * static_cast<uint8_t>(b >> (8 * i));
    return c;
}

// ---- arithmetic of one rounding ----

PREQUANT_DEVICE_FUNCTION float __fadd_rn(float a, float b) { return a + b; }
PREQUANT_DEVICE_FUNCTION float __fsub_rn(float a, float b) { return a - b; }
PREQUANT_DEVICE_FUNCTION float __fmul_rn(float a, float b) { return a * b; }
PREQUANT_DEVICE_FUNCTION float __fdiv_rn(float a, float b) { return a / b; }
PREQUANT_DEVICE_FUNCTION float __frcp_rn(float a) { return 1.0f / a; }
PREQUANT_DEVICE_FUNCTION float __fsqrt_rn(float a) { return std::sqrt(a); }
PREQUANT_DEVICE_FUNCTION float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
PREQUANT_DEVICE_FUNCTION double __dadd_rn(double a, double b) { return a + b; }
PREQUANT_DEVICE_FUNCTION double __dsub_rn(double a, double b) { return a - b; }
PREQUANT_DEVICE_FUNCTION double __dmul_rn(double a, double b) { return a * b; }
PREQUANT_DEVICE_FUNCTION double __ddiv_rn(double a, double b) { return a / b; }
PREQUANT_DEVICE_FUNCTION double __drcp_rn(double a) { return 1.0 / a; }
PREQUANT_DEVICE_FUNCTION double __dsqrt_rn(double a) { return std::sqrt(a); }
PREQUANT_DEVICE_FUNCTION double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
PREQUANT_DEVICE_FUNCTION float __saturatef(float a) { return a > 0 ? a < 1 ? a : 1.0f : 0.0f; }

// ---- conversions ----
//
// Out of range goes to the nearest end, NaN to 0 (64-bit targets: to the end that the hardware gives).

namespace prequant::emulator {
template <typename To, typename From>
To saturated(From value) {
    if (std::isnan(value)) return sizeof(To) == 8 ? std::numeric_limits<To>::min() : To(0);
    if (value < static_cast<From>(std::numeric_limits<To>::min())) return std::numeric_limits<To>::min();
    if (value >= -2 * static_cast<From>(std::numeric_limits<To>::min() / 2) && std::is_signed_v<To>)
        return std::numeric_limits<To>::max();
    if (value > static_cast<From>(std::numeric_limits<To>::max())) return std::numeric_limits<To>::max();
    return static_cast<To>(value);
}
}  // namespace prequant::emulator

PREQUANT_DEVICE_FUNCTION int __float2int_rn(float value) {
    return prequant::emulator::saturated<int>(std::rint(value));
}
PREQUANT_DEVICE_FUNCTION int __float2int_rz(float value) {
    return prequant::emulator::saturated<int>(std::trunc(value));
}
PREQUANT_DEVICE_FUNCTION int __float2int_rd(float value) {
    return prequant::emulator::saturated<int>(std::floor(value));
}
PREQUANT_DEVICE_FUNCTION int __float2int_ru(float value) {
    return prequant::emulator::saturated<int>(std::ceil(value));
}
PREQUANT_DEVICE_FUNCTION long long __float2ll_rn(float value) {
    return prequant::emulator::saturated<long long>(std::rint(value));
}
PREQUANT_DEVICE_FUNCTION int __double2int_rn(double value) {
    return prequant::emulator::saturated<int>(std::rint(value));
}
PREQUANT_DEVICE_FUNCTION long long __double2ll_rn(double value) {
    return prequant::emulator::saturated<long long>(std::rint(value));
}
PREQUANT_DEVICE_FUNCTION long long __double2ll_rz(double value) {
    return prequant::emulator::saturated<long long>(std::trunc(value));
}
PREQUANT_DEVICE_FUNCTION float __double2float_rn(double value) { return static_cast<float>(value); }
PREQUANT_DEVICE_FUNCTION float __int2float_rn(int value) { return static_cast<float>(value); }
PREQUANT_DEVICE_FUNCTION float __uint2float_rn(unsigned value) { return static_cast<float>(value); }
PREQUANT_DEVICE_FUNCTION float __ll2float_rn(long long value) { return static_cast<float>(value); }
PREQUANT_DEVICE_FUNCTION double __int2double_rn(int value) { return static_cast<double>(value); }
PREQUANT_DEVICE_FUNCTION double __ll2double_rn(long long value) { return static_cast<double>(value); }

// ---- 16-bit floats ----
//
// A product of two and a sum fit a double but for one rounding, and that to odd keeps the second one right.

namespace prequant::emulator {
// a * b + c in double, its last bit set where the sum was inexact: rounding it to fewer bits then rounds the true
// value.
inline double fma_to_odd(double a, double b, double c) {
    const double product = a * b, sum = product + c;  // the product is exact: 11 bits each
    const double part = sum - product;
    const double error = (product - (sum - part)) + (c - part);
    auto bits = std::bit_cast<uint64_t>(sum);
    if (error != 0 && std::isfinite(sum) && !(bits & 1)) bits += (error > 0) == (sum > 0) ? 1 : -1;
    return std::bit_cast<double>(bits);
}
}  // namespace prequant::emulator

PREQUANT_DEVICE_FUNCTION __half __hfma(__half a, __half b, __half c) {
    return __double2half(prequant::emulator::fma_to_odd(__half2float(a), __half2float(b), __half2float(c)));
}
PREQUANT_DEVICE_FUNCTION __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
    return __halves2half2(__hfma(__low2half(a), __low2half(b), __low2half(c)),
                          __hfma(__high2half(a), __high2half(b), __high2half(c)));
}
PREQUANT_DEVICE_FUNCTION __nv_bfloat16 __hfma(__nv_bfloat16 a, __nv_bfloat16 b, __nv_bfloat16 c) {
    return __double2bfloat16(
        prequant::emulator::fma_to_odd(__bfloat162float(a), __bfloat162float(b), __bfloat162float(c)));
}
PREQUANT_DEVICE_FUNCTION __nv_bfloat162 __hfma2(__nv_bfloat162 a, __nv_bfloat162 b, __nv_bfloat162 c) {
    return __halves2bfloat162(__hfma(__low2bfloat16(a), __low2bfloat16(b), __low2bfloat16(c)),
                              __hfma(__high2bfloat16(a), __high2bfloat16(b), __high2bfloat16(c)));
}

// ---- min and max: of floats, the number where the other is NaN ----

#define PREQUANT_MIN_MAX(T)                                                      \
    PREQUANT_DEVICE_FUNCTION constexpr T min(T a, T b) { return b < a ? b : a; } \
    PREQUANT_DEVICE_FUNCTION constexpr T max(T a, T b) { return a < b ? b : a; }
PREQUANT_MIN_MAX(int)
PREQUANT_MIN_MAX(unsigned)
PREQUANT_MIN_MAX(long)
PREQUANT_MIN_MAX(unsigned long)
PREQUANT_MIN_MAX(long long)
PREQUANT_MIN_MAX(unsigned long long)
#undef PREQUANT_MIN_MAX
PREQUANT_DEVICE_FUNCTION float min(float a, float b) { return std::fmin(a, b); }
PREQUANT_DEVICE_FUNCTION float max(float a, float b) { return std::fmax(a, b); }
PREQUANT_DEVICE_FUNCTION double min(double a, double b) { return std::fmin(a, b); }
PREQUANT_DEVICE_FUNCTION double max(double a, double b) { return std::fmax(a, b); }
