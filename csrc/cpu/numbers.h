// What the kernels of a level are made of: threads, rounding, vectors of floats, and the three float types.
#pragma once

#ifndef PREQUANT_LEVEL
#error "include the kernels through isa/<level>.cpp"
#endif

#include <cstdint>
#include <cstring>

#include "../kernels.h"
#include "parallel.h"

namespace prequant::PREQUANT_LEVEL {

template <typename T>
inline T smaller(T a, T b) {
    return b < a ? b : a;
}

template <typename T>
inline T larger(T a, T b) {
    return a < b ? b : a;
}

// body(begin, end) over ranges of 0 .. tasks; `task_cost` in nanoseconds, roughly.
template <typename Body>
inline void parallel_for(int64_t tasks, int64_t task_cost, const Body& body) {
    parallel_ranges(
        tasks, task_cost,
        [](int64_t begin, int64_t end, const void* context) { (*static_cast<const Body*>(context))(begin, end); },
        &body);
}

// Half to even, for |x| below 2^22: the addition leaves no bits behind the point. Vectorizes on every CPU, unlike
// rintf.
inline float round_even(float x) { return (x + kRounder) - kRounder; }

constexpr int64_t kSpan = 2048;  // columns of a row that a kernel takes at a time, as a task's scratch holds them

// ---- vectors ----

// 512, 256 or 128 bits. Arithmetic, comparison and shifts are the compiler's own on these types; the few steps that
// have no operator are functions.
constexpr int kLanes = PREQUANT_AVX512 ? 16 : PREQUANT_AVX2 ? 8 : 4;
typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

template <typename V>
inline V load_vector(const void* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

template <typename V>
inline void store_vector(void* p, V v) {
    std::memcpy(p, &v, sizeof v);
}

inline Vector load(const float* p) { return load_vector<Vector>(p); }
inline void store(float* p, Vector v) { store_vector(p, v); }
inline Vector broadcast(float x) { return x - Vector{}; }  // not Vector{} + x: -0 stays -0
inline Ints broadcast(int32_t x) { return x - Ints{}; }
inline Vector to_floats(Ints v) { return __builtin_convertvector(v, Vector); }

inline Vector multiply_add(Vector a, Vector b, Vector sum) {
#if PREQUANT_AVX512
    return _mm512_fmadd_ps(a, b, sum);
#elif PREQUANT_AVX2
    return _mm256_fmadd_ps(a, b, sum);
#else
    return sum + a * b;
#endif
}

inline float sum_lanes(Vector v) {
    float lanes[kLanes];
    store(lanes, v);
    for (int width = kLanes / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    return lanes[0];
}

// ---- float16 and bfloat16 ----

inline uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

inline float float_from_half(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, magnitude = half & 0x7fff;
    // The exponent is 112 more, or 255: Inf and NaN.
    const float normal = float_of((magnitude << 13) + (magnitude < 0x7c00 ? 0x38000000u : 0x70000000u));
    const float subnormal = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f;
    return float_of(bits_of(magnitude < 0x400 ? subnormal : normal) | sign);
}

inline uint16_t half_from_float(float x) {
    const uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    // 0.5's last bit is 2^-24, the unit of subnormal halves.
    const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000;
    const uint32_t normal = (magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13;
    const uint32_t half = magnitude > 0x7f800000    ? 0x7e00
                          : magnitude >= 0x477ff000 ? 0x7c00
                          : magnitude < 0x38800000  ? subnormal
                                                    : normal;
    return static_cast<uint16_t>(half | sign);
}

inline float float_from_bfloat16(uint16_t x) { return float_of(static_cast<uint32_t>(x) << 16); }

inline uint16_t bfloat16_from_float(float x) {
    const uint32_t bits = bits_of(x), rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16 | 0x40) : rounded);
}

constexpr int64_t size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

// Elements begin .. begin + count of `data` as float32.
inline void load_floats(const void* data, Dtype dtype, int64_t begin, int64_t count, float* floats) {
    if (dtype == Dtype::float32) {
        std::memcpy(floats, static_cast<const float*>(data) + begin, static_cast<size_t>(count) * sizeof(float));
        return;
    }
    const uint16_t* source = static_cast<const uint16_t*>(data) + begin;
    int64_t i = 0;
    if (dtype == Dtype::float16) {
#if PREQUANT_AVX512 || PREQUANT_AVX2
        for (; i + 8 <= count; i += 8)
            _mm256_storeu_ps(floats + i,
                             _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i))));
#endif
        for (; i < count; ++i) floats[i] = float_from_half(source[i]);
    } else {
        for (; i < count; ++i) floats[i] = float_from_bfloat16(source[i]);
    }
}

// The same without a copy where the data is float32 already.
inline const float* as_floats(const void* data, Dtype dtype, int64_t begin, int64_t count, float* scratch) {
    if (dtype == Dtype::float32) return static_cast<const float*>(data) + begin;
    load_floats(data, dtype, begin, count, scratch);
    return scratch;
}

inline void store_floats(const float* floats, int64_t count, void* data, Dtype dtype, int64_t begin) {
    if (dtype == Dtype::float32) {
        std::memcpy(static_cast<float*>(data) + begin, floats, static_cast<size_t>(count) * sizeof(float));
        return;
    }
    uint16_t* target = static_cast<uint16_t*>(data) + begin;
    int64_t i = 0;
    if (dtype == Dtype::float16) {
#if PREQUANT_AVX512 || PREQUANT_AVX2
        for (; i + 8 <= count; i += 8)
            _mm_storeu_si128(reinterpret_cast<__m128i*>(target + i),
                             _mm256_cvtps_ph(_mm256_loadu_ps(floats + i), _MM_FROUND_TO_NEAREST_INT));
#endif
        for (; i < count; ++i) target[i] = half_from_float(floats[i]);
    } else {
        for (; i < count; ++i) target[i] = bfloat16_from_float(floats[i]);
    }
}

inline float load_float(const void* data, Dtype dtype, int64_t i) {
    switch (dtype) {
        case Dtype::float16: return float_from_half(static_cast<const uint16_t*>(data)[i]);
        case Dtype::bfloat16: return float_from_bfloat16(static_cast<const uint16_t*>(data)[i]);
        default: return static_cast<const float*>(data)[i];
    }
}

inline void store_float(float x, void* data, Dtype dtype, int64_t i) {
    switch (dtype) {
        case Dtype::float16: static_cast<uint16_t*>(data)[i] = half_from_float(x); break;
        case Dtype::bfloat16: static_cast<uint16_t*>(data)[i] = bfloat16_from_float(x); break;
        default: static_cast<float*>(data)[i] = x;
    }
}

}  // namespace prequant::PREQUANT_LEVEL
