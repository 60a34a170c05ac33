// AVX-512 and VNNI for a CPU that has AVX2 alone: what csrc/cpu uses of them, each function as Intel's intrinsics guide
// defines it. Tests only.
//
// Stands before g++'s own header of this name (-I csrc/emulator/isa) and takes that one's parts up to AVX2, FMA and
// F16C. An intrinsic that is missing here is not declared at all, so that it does not compile. What works on each 128
// bits alone is done by the CPU's own instruction, on two halves. The integer products are in cpu/integers.h, in
// assembly or as what it does.
#pragma once

#ifndef PREQUANT_EMULATED_ISA
#error "only for the test libraries of python_tests/support/cpu_variants.py"
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

#include <cstring>

typedef float __m512 __attribute__((vector_size(64), may_alias));
typedef long long __m512i __attribute__((vector_size(64), may_alias));

#define PREQUANT_INTRINSIC inline __attribute__((always_inline))

namespace prequant_emulated_isa {

// A function of 256 bits on both halves of each operand.
template <typename Half, typename Whole, typename Function, typename... Rest>
PREQUANT_INTRINSIC Whole by_halves(Function function, Whole first, Rest... rest) {
    const auto half = [](const auto& whole, int i) {
        Half part;
        std::memcpy(&part, reinterpret_cast<const char*>(&whole) + i * sizeof part, sizeof part);
        return part;
    };
    const Half halves[2] = {function(half(first, 0), half(rest, 0)...), function(half(first, 1), half(rest, 1)...)};
    Whole whole;
    static_assert(sizeof halves == sizeof whole);
    std::memcpy(&whole, halves, sizeof whole);
    return whole;
}

}  // namespace prequant_emulated_isa

PREQUANT_INTRINSIC __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
    return prequant_emulated_isa::by_halves<__m256>(
        [](__m256 x, __m256 y, __m256 z) { return _mm256_fmadd_ps(x, y, z); }, a, b, c);
}

PREQUANT_INTRINSIC __m512i _mm512_shuffle_epi8(__m512i a, __m512i order) {
    return prequant_emulated_isa::by_halves<__m256i>([](__m256i x, __m256i y) { return _mm256_shuffle_epi8(x, y); }, a,
                                                     order);
}

PREQUANT_INTRINSIC __m512i _mm512_broadcast_i32x4(__m128i x) {
    const __m128i parts[4] = {x, x, x, x};
    __m512i whole;
    std::memcpy(&whole, parts, sizeof whole);
    return whole;
}
