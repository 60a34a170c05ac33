// AVX-512 and VNNI for a CPU that has AVX2 alone: what csrc/cpu uses of them, each function as Intel's intrinsics guide defines it. Tests only.
//
// Stands before g++'s own header of this name (-I csrc/emulator/isa) and takes that one's parts up to AVX2, FMA and F16C. An intrinsic that is missing here
// is not declared at all, so that it does not compile. What works on each 128 bits alone is done by the CPU's own instruction, on two halves.
//
// Checked    what the hardware would fault on: an aligned access off 64 bytes traps; masked bytes are not touched.
#pragma once

#ifndef PREQUANT_EMULATED_ISA
#error "only for the test libraries of python_tests/cpu_variants.py"
#endif

#define _IMMINTRIN_H_INCLUDED  // the parts ask for it, and the whole stays out
// clang-format off: each needs the ones before it
#include <mmintrin.h>
#include <xmmintrin.h>
#include <emmintrin.h>
#include <pmmintrin.h>
#include <tmmintrin.h>
#include <smmintrin.h>
#include <wmmintrin.h>
#include <avxintrin.h>
#include <avx2intrin.h>
#include <f16cintrin.h>
#include <fmaintrin.h>
// clang-format on

#include <cstdint>
#include <cstring>

typedef float __m512 __attribute__((vector_size(64), may_alias));
typedef long long __m512i __attribute__((vector_size(64), may_alias));
typedef uint16_t __mmask16;
typedef uint64_t __mmask64;

#define PREQUANT_INTRINSIC inline __attribute__((always_inline))

namespace prequant_emulated_isa {

typedef int8_t I8 __attribute__((vector_size(64)));
typedef uint8_t U8 __attribute__((vector_size(64)));
typedef uint16_t U16 __attribute__((vector_size(64)));
typedef int32_t I32 __attribute__((vector_size(64)));
typedef uint32_t U32 __attribute__((vector_size(64)));
typedef uint64_t U64 __attribute__((vector_size(64)));
typedef float F32 __attribute__((vector_size(64)));

void unsupported() __attribute__((error("this immediate operand is not emulated: see csrc/emulator/isa/immintrin.h")));

PREQUANT_INTRINSIC void require_alignment(const void* address) {
    if (reinterpret_cast<uintptr_t>(address) % 64 != 0) __builtin_trap();
}

template <typename Half, typename Whole>
PREQUANT_INTRINSIC Half half_of(Whole whole, int i) {
    Half halves[2];
    static_assert(sizeof halves == sizeof whole);
    std::memcpy(halves, &whole, sizeof whole);
    return halves[i];
}

template <typename Whole, typename Half>
PREQUANT_INTRINSIC Whole join(Half low, Half high) {
    const Half halves[2] = {low, high};
    Whole whole;
    static_assert(sizeof halves == sizeof whole);
    std::memcpy(&whole, halves, sizeof whole);
    return whole;
}

// A function of 256 bits on both halves of each operand.
template <typename Half, typename Whole, typename... Rest, typename Function>
PREQUANT_INTRINSIC Whole by_halves(Function function, Whole first, Rest... rest) {
    return join<Whole>(function(half_of<Half>(first, 0), half_of<Half>(rest, 0)...), function(half_of<Half>(first, 1), half_of<Half>(rest, 1)...));
}

// Four unsigned bytes of a times four signed ones of b, added to each sum, which wraps: in pairs of 16 bits, none of which saturates.
PREQUANT_INTRINSIC __m256i dot_bytes(__m256i sum, __m256i a, __m256i b) {
    const __m256i even_a = _mm256_and_si256(a, _mm256_set1_epi16(255)), odd_a = _mm256_srli_epi16(a, 8);
    const __m256i even_b = _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8), odd_b = _mm256_srai_epi16(b, 8);
    return _mm256_add_epi32(sum, _mm256_add_epi32(_mm256_madd_epi16(even_a, even_b), _mm256_madd_epi16(odd_a, odd_b)));
}

PREQUANT_INTRINSIC __m256i dot_words(__m256i sum, __m256i a, __m256i b) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }

template <typename Lanes, typename Value, typename Combine>
PREQUANT_INTRINSIC Value reduce(Lanes lanes, Value, Combine combine) {
    for (int width = 8; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) lanes[i] = combine(lanes[i + width], lanes[i]);
    return lanes[0];
}

template <typename Function>
PREQUANT_INTRINSIC __m512i each_word(Function function) {
    U32 words;
    for (int i = 0; i < 16; ++i) words[i] = static_cast<uint32_t>(function(i));
    return reinterpret_cast<__m512i>(words);
}

}  // namespace prequant_emulated_isa

#define PREQUANT_LANES(type, x) ((prequant_emulated_isa::type)(x))

// ---- constants, casts, loads and stores --------------------------------------------------------------------------------------------------

PREQUANT_INTRINSIC __m512i _mm512_setzero_si512() { return __m512i{}; }
PREQUANT_INTRINSIC __m512 _mm512_setzero_ps() { return __m512{}; }
PREQUANT_INTRINSIC __m512i _mm512_set1_epi32(int x) { return (__m512i)(prequant_emulated_isa::I32{} + x); }
PREQUANT_INTRINSIC __m512i _mm512_set1_epi8(char x) { return (__m512i)(prequant_emulated_isa::I8{} + static_cast<int8_t>(x)); }
PREQUANT_INTRINSIC __m512 _mm512_set1_ps(float x) { return x - __m512{}; }  // x + 0 would lose the sign of -0
PREQUANT_INTRINSIC __m512i _mm512_setr_epi32(int e0, int e1, int e2, int e3, int e4, int e5, int e6, int e7, int e8, int e9, int e10, int e11, int e12, int e13,
                                             int e14, int e15) {
    return (__m512i)(prequant_emulated_isa::I32{e0, e1, e2, e3, e4, e5, e6, e7, e8, e9, e10, e11, e12, e13, e14, e15});
}

PREQUANT_INTRINSIC __m512 _mm512_castsi512_ps(__m512i x) { return (__m512)(x); }
PREQUANT_INTRINSIC __m512i _mm512_castps_si512(__m512 x) { return (__m512i)(x); }

PREQUANT_INTRINSIC __m512i _mm512_loadu_si512(const void* p) {
    __m512i x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
PREQUANT_INTRINSIC __m512i _mm512_load_si512(const void* p) {
    prequant_emulated_isa::require_alignment(p);
    return _mm512_loadu_si512(p);
}
PREQUANT_INTRINSIC __m512 _mm512_loadu_ps(const void* p) { return (__m512)_mm512_loadu_si512(p); }
PREQUANT_INTRINSIC void _mm512_storeu_si512(void* p, __m512i x) { std::memcpy(p, &x, sizeof x); }
PREQUANT_INTRINSIC void _mm512_store_si512(void* p, __m512i x) {
    prequant_emulated_isa::require_alignment(p);
    std::memcpy(p, &x, sizeof x);
}
PREQUANT_INTRINSIC void _mm512_storeu_ps(void* p, __m512 x) { std::memcpy(p, &x, sizeof x); }

PREQUANT_INTRINSIC __m512i _mm512_maskz_loadu_epi8(__mmask64 mask, const void* p) {
    if (mask == ~__mmask64{0}) return _mm512_loadu_si512(p);
    prequant_emulated_isa::U8 x = {};
    for (int i = 0; i < 64; ++i)
        if (mask >> i & 1) x[i] = static_cast<const uint8_t*>(p)[i];
    return (__m512i)x;
}
PREQUANT_INTRINSIC __m512 _mm512_maskz_loadu_ps(__mmask16 mask, const void* p) {
    if (mask == 0xffff) return _mm512_loadu_ps(p);
    __m512 x = {};
    for (int i = 0; i < 16; ++i)
        if (mask >> i & 1) x[i] = static_cast<const float*>(p)[i];
    return x;
}
PREQUANT_INTRINSIC void _mm_mask_storeu_epi8(void* p, __mmask16 mask, __m128i x) {
    uint8_t bytes[16];
    std::memcpy(bytes, &x, sizeof x);
    for (int i = 0; i < 16; ++i)
        if (mask >> i & 1) static_cast<uint8_t*>(p)[i] = bytes[i];
}

// ---- integers ----------------------------------------------------------------------------------------------------------------------------

PREQUANT_INTRINSIC __m512i _mm512_and_si512(__m512i a, __m512i b) { return a & b; }
PREQUANT_INTRINSIC __m512i _mm512_or_si512(__m512i a, __m512i b) { return a | b; }
PREQUANT_INTRINSIC __m512i _mm512_xor_si512(__m512i a, __m512i b) { return a ^ b; }
PREQUANT_INTRINSIC __m512i _mm512_add_epi32(__m512i a, __m512i b) { return (__m512i)(PREQUANT_LANES(U32, a) + PREQUANT_LANES(U32, b)); }
PREQUANT_INTRINSIC __m512i _mm512_sub_epi32(__m512i a, __m512i b) { return (__m512i)(PREQUANT_LANES(U32, a) - PREQUANT_LANES(U32, b)); }
PREQUANT_INTRINSIC __m512i _mm512_mullo_epi32(__m512i a, __m512i b) { return (__m512i)(PREQUANT_LANES(U32, a) * PREQUANT_LANES(U32, b)); }
PREQUANT_INTRINSIC __m512i _mm512_mask_add_epi32(__m512i source, __mmask16 mask, __m512i a, __m512i b) {
    const __m512i sums = _mm512_add_epi32(a, b);
    return prequant_emulated_isa::each_word([&](int i) { return (mask >> i & 1 ? PREQUANT_LANES(I32, sums) : PREQUANT_LANES(I32, source))[i]; });
}
PREQUANT_INTRINSIC __m512i _mm512_min_epi32(__m512i a, __m512i b) {
    return (__m512i)(PREQUANT_LANES(I32, a) < PREQUANT_LANES(I32, b) ? PREQUANT_LANES(I32, a) : PREQUANT_LANES(I32, b));
}
PREQUANT_INTRINSIC __m512i _mm512_max_epi32(__m512i a, __m512i b) {
    return (__m512i)(PREQUANT_LANES(I32, a) > PREQUANT_LANES(I32, b) ? PREQUANT_LANES(I32, a) : PREQUANT_LANES(I32, b));
}
PREQUANT_INTRINSIC __m512i _mm512_max_epu32(__m512i a, __m512i b) {
    return (__m512i)(PREQUANT_LANES(U32, a) > PREQUANT_LANES(U32, b) ? PREQUANT_LANES(U32, a) : PREQUANT_LANES(U32, b));
}

// A shift by the lane's width or more leaves 0.
PREQUANT_INTRINSIC __m512i _mm512_slli_epi32(__m512i a, unsigned bits) { return bits > 31 ? __m512i{} : (__m512i)(PREQUANT_LANES(U32, a) << bits); }
PREQUANT_INTRINSIC __m512i _mm512_srli_epi32(__m512i a, unsigned bits) { return bits > 31 ? __m512i{} : (__m512i)(PREQUANT_LANES(U32, a) >> bits); }
PREQUANT_INTRINSIC __m512i _mm512_slli_epi64(__m512i a, unsigned bits) { return bits > 63 ? __m512i{} : (__m512i)(PREQUANT_LANES(U64, a) << bits); }
PREQUANT_INTRINSIC __m512i _mm512_srli_epi16(__m512i a, unsigned bits) { return bits > 15 ? __m512i{} : (__m512i)(PREQUANT_LANES(U16, a) >> bits); }
PREQUANT_INTRINSIC __m512i _mm512_srlv_epi32(__m512i a, __m512i bits) { return prequant_emulated_isa::by_halves<__m256i>(_mm256_srlv_epi32, a, bits); }

PREQUANT_INTRINSIC int _mm512_reduce_add_epi32(__m512i a) {
    return static_cast<int>(prequant_emulated_isa::reduce(PREQUANT_LANES(U32, a), 0u, [](uint32_t x, uint32_t y) { return x + y; }));
}
PREQUANT_INTRINSIC unsigned _mm512_reduce_max_epu32(__m512i a) {
    return prequant_emulated_isa::reduce(PREQUANT_LANES(U32, a), 0u, [](uint32_t x, uint32_t y) { return x > y ? x : y; });
}

PREQUANT_INTRINSIC __m512i _mm512_dpbusd_epi32(__m512i sum, __m512i a, __m512i b) {
    return prequant_emulated_isa::by_halves<__m256i>(prequant_emulated_isa::dot_bytes, sum, a, b);
}
PREQUANT_INTRINSIC __m512i _mm512_dpwssd_epi32(__m512i sum, __m512i a, __m512i b) {
    return prequant_emulated_isa::by_halves<__m256i>(prequant_emulated_isa::dot_words, sum, a, b);
}
PREQUANT_INTRINSIC __m256i _mm256_dpbusd_avx_epi32(__m256i sum, __m256i a, __m256i b) { return prequant_emulated_isa::dot_bytes(sum, a, b); }
PREQUANT_INTRINSIC __m256i _mm256_dpwssd_avx_epi32(__m256i sum, __m256i a, __m256i b) { return prequant_emulated_isa::dot_words(sum, a, b); }

// ---- orders ------------------------------------------------------------------------------------------------------------------------------

PREQUANT_INTRINSIC __m512i _mm512_unpacklo_epi8(__m512i a, __m512i b) { return prequant_emulated_isa::by_halves<__m256i>(_mm256_unpacklo_epi8, a, b); }
PREQUANT_INTRINSIC __m512i _mm512_unpackhi_epi8(__m512i a, __m512i b) { return prequant_emulated_isa::by_halves<__m256i>(_mm256_unpackhi_epi8, a, b); }
PREQUANT_INTRINSIC __m512i _mm512_unpacklo_epi32(__m512i a, __m512i b) { return prequant_emulated_isa::by_halves<__m256i>(_mm256_unpacklo_epi32, a, b); }
PREQUANT_INTRINSIC __m512i _mm512_unpackhi_epi32(__m512i a, __m512i b) { return prequant_emulated_isa::by_halves<__m256i>(_mm256_unpackhi_epi32, a, b); }
PREQUANT_INTRINSIC __m512i _mm512_unpacklo_epi64(__m512i a, __m512i b) { return prequant_emulated_isa::by_halves<__m256i>(_mm256_unpacklo_epi64, a, b); }
PREQUANT_INTRINSIC __m512i _mm512_unpackhi_epi64(__m512i a, __m512i b) { return prequant_emulated_isa::by_halves<__m256i>(_mm256_unpackhi_epi64, a, b); }

PREQUANT_INTRINSIC __m512i _mm512_broadcast_i32x4(__m128i a) {
    const __m256i twice = _mm256_broadcastsi128_si256(a);
    return prequant_emulated_isa::join<__m512i>(twice, twice);
}
PREQUANT_INTRINSIC __m512i _mm512_shuffle_epi8(__m512i a, __m512i order) { return prequant_emulated_isa::by_halves<__m256i>(_mm256_shuffle_epi8, a, order); }

// Word i of the result: of its own 128 bits, word `order` bits 2i .. 2i + 1, from a for the lower two and from b for the upper.
PREQUANT_INTRINSIC __m512 _mm512_shuffle_ps(__m512 a, __m512 b, int order) {
    return (__m512)prequant_emulated_isa::each_word([&](int i) {
        const int word = i / 4 * 4 + (order >> i % 4 * 2 & 3);
        return i % 4 < 2 ? PREQUANT_LANES(U32, a)[word] : PREQUANT_LANES(U32, b)[word];
    });
}
// The same with quarters of 128 bits for words.
PREQUANT_INTRINSIC __m512i _mm512_shuffle_i32x4(__m512i a, __m512i b, int order) {
    return prequant_emulated_isa::each_word([&](int i) {
        const int word = (order >> i / 4 * 2 & 3) * 4 + i % 4;
        return i < 8 ? PREQUANT_LANES(U32, a)[word] : PREQUANT_LANES(U32, b)[word];
    });
}
PREQUANT_INTRINSIC __m512i _mm512_permutexvar_epi32(__m512i order, __m512i a) {
    return prequant_emulated_isa::each_word([&](int i) { return PREQUANT_LANES(U32, a)[PREQUANT_LANES(U32, order)[i] & 15]; });
}

// ---- floats and conversions --------------------------------------------------------------------------------------------------------------

PREQUANT_INTRINSIC __m512 _mm512_mul_ps(__m512 a, __m512 b) { return a * b; }
PREQUANT_INTRINSIC __m512 _mm512_min_ps(__m512 a, __m512 b) { return prequant_emulated_isa::by_halves<__m256>(_mm256_min_ps, a, b); }
PREQUANT_INTRINSIC __m512 _mm512_max_ps(__m512 a, __m512 b) { return prequant_emulated_isa::by_halves<__m256>(_mm256_max_ps, a, b); }
PREQUANT_INTRINSIC __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) { return prequant_emulated_isa::by_halves<__m256>(_mm256_fmadd_ps, a, b, c); }
PREQUANT_INTRINSIC float _mm512_reduce_min_ps(__m512 a) {
    return prequant_emulated_isa::reduce(PREQUANT_LANES(F32, a), 0.0f, [](float x, float y) { return x < y ? x : y; });
}
PREQUANT_INTRINSIC float _mm512_reduce_max_ps(__m512 a) {
    return prequant_emulated_isa::reduce(PREQUANT_LANES(F32, a), 0.0f, [](float x, float y) { return x > y ? x : y; });
}

PREQUANT_INTRINSIC void require_nearest(int rounding) {
    if ((rounding | _MM_FROUND_NO_EXC) != (_MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)) prequant_emulated_isa::unsupported();
}
PREQUANT_INTRINSIC __m512i _mm512_cvt_roundps_epi32(__m512 a, int rounding) {
    require_nearest(rounding);  // which the CPU's conversion does unless told otherwise
    return prequant_emulated_isa::join<__m512i>(_mm256_cvtps_epi32(prequant_emulated_isa::half_of<__m256>(a, 0)),
                                                _mm256_cvtps_epi32(prequant_emulated_isa::half_of<__m256>(a, 1)));
}
PREQUANT_INTRINSIC __m512 _mm512_cvtepi32_ps(__m512i a) { return (__m512) __builtin_convertvector(PREQUANT_LANES(I32, a), prequant_emulated_isa::F32); }
PREQUANT_INTRINSIC __m128i _mm512_cvtepi32_epi8(__m512i a) {
    typedef uint8_t Bytes __attribute__((vector_size(16)));
    return (__m128i) __builtin_convertvector(PREQUANT_LANES(U32, a), Bytes);
}
PREQUANT_INTRINSIC __m512i _mm512_cvtepu8_epi32(__m128i a) {
    return prequant_emulated_isa::join<__m512i>(_mm256_cvtepu8_epi32(a), _mm256_cvtepu8_epi32(_mm_srli_si128(a, 8)));
}
PREQUANT_INTRINSIC __m512i _mm512_cvtepu8_epi64(__m128i a) {
    return prequant_emulated_isa::join<__m512i>(_mm256_cvtepu8_epi64(a), _mm256_cvtepu8_epi64(_mm_srli_si128(a, 4)));
}
PREQUANT_INTRINSIC __m512 _mm512_cvtph_ps(__m256i a) {
    return prequant_emulated_isa::join<__m512>(_mm256_cvtph_ps(_mm256_castsi256_si128(a)), _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1)));
}
PREQUANT_INTRINSIC __m256i _mm512_cvtps_ph(__m512 a, int rounding) {
    require_nearest(rounding);
    return prequant_emulated_isa::join<__m256i>(_mm256_cvtps_ph(prequant_emulated_isa::half_of<__m256>(a, 0), _MM_FROUND_TO_NEAREST_INT),
                                                _mm256_cvtps_ph(prequant_emulated_isa::half_of<__m256>(a, 1), _MM_FROUND_TO_NEAREST_INT));
}

#undef PREQUANT_LANES
#undef PREQUANT_INTRINSIC
