// The two integer products that kernels are made of, on lanes of 32 bits:
//
//   dot_words   sum += a0 w0 + a1 w1                     two int16 each           vpdpwssd; avx2: vpmaddwd, vpaddd
//   dot_bytes   sum += a0 w0 + a1 w1 + a2 w2 + a3 w3     a unsigned, w signed     vpdpbusd; avx2: vpmaddubsw, vpaddw;
//                                                                                 portable: none
//
// In assembly, since GCC 12 copies and spills the accumulators of the intrinsics, which halves the speed. Where there
// are 16 registers, w comes straight from memory: an instruction less for each use.
//
// Requires   avx2: |w| <= kByteLimit, for dot_bytes keeps two int16 sums in a lane. Each step adds at most 2 * 255 * 8
//            to one of them, so that kByteRun steps fit; then add_run moves them to int32.
#pragma once

#include "numbers.h"

namespace prequant::PREQUANT_LEVEL {

#if PREQUANT_AVX512 || PREQUANT_AVX2
constexpr bool kHasBytes = true;
constexpr bool kHasByteRuns = !PREQUANT_VNNI;
#else
constexpr bool kHasBytes = false;
constexpr bool kHasByteRuns = false;
#endif
constexpr int kByteLimit = 8, kByteRun = 8;
static_assert(kByteRun * 2 * 255 * kByteLimit <= INT16_MAX, "a run must fit int16");

#if PREQUANT_AVX512
#define PREQUANT_WEIGHTS "v"
#else
#define PREQUANT_WEIGHTS "m"
#endif

#if defined(PREQUANT_EMULATED_ISA) || defined(__SANITIZE_ADDRESS__)
// In test libraries, for a CPU without these instructions or for AddressSanitizer, which does not see what assembly
// reads: what they do, lane by lane.
inline void dot_words(Ints& sum, const Ints& a, const Ints& w) {
    sum += ((a << 16) >> 16) * ((w << 16) >> 16) + (a >> 16) * (w >> 16);
}
inline void dot_bytes(Ints& sum, const Ints& a, const Ints& w) {
#if PREQUANT_AVX2 && !PREQUANT_VNNI
    sum = reinterpret_cast<Ints>(
        _mm256_add_epi16(reinterpret_cast<__m256i>(sum),
                         _mm256_maddubs_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(w))));
#else
    for (int byte = 0; byte < 4; ++byte) sum += ((a >> (8 * byte)) & 255) * ((w << (24 - 8 * byte)) >> 24);
#endif
}
inline void dot_words_in_registers(Ints& sum, const Ints& a, const Ints& w) { dot_words(sum, a, w); }
inline void dot_bytes_in_registers(Ints& sum, const Ints& a, const Ints& w) { dot_bytes(sum, a, w); }
inline void start_bytes(Ints& sum, const Ints& a, const Ints& w) {
    sum = Ints{};
    dot_bytes(sum, a, w);
}
#else
inline void dot_words(Ints& sum, const Ints& a, const Ints& w) {
#if PREQUANT_AVX512
    __asm__("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), PREQUANT_WEIGHTS(w));
#elif PREQUANT_AVX2 && PREQUANT_VNNI
    __asm__("%{vex%} vpdpwssd %2, %1, %0" : "+x"(sum) : "x"(a), PREQUANT_WEIGHTS(w));
#elif PREQUANT_AVX2
    Ints product;
    __asm__("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "=&x"(product) : "x"(a), PREQUANT_WEIGHTS(w));
#elif defined(__SSE2__)
    sum += reinterpret_cast<Ints>(_mm_madd_epi16(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(w)));
#else
    sum += ((a << 16) >> 16) * ((w << 16) >> 16) + (a >> 16) * (w >> 16);
#endif
}

#if PREQUANT_AVX512 || PREQUANT_AVX2
inline void dot_bytes(Ints& sum, const Ints& a, const Ints& w) {
#if PREQUANT_AVX512
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), PREQUANT_WEIGHTS(w));
#elif PREQUANT_VNNI
    __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(a), PREQUANT_WEIGHTS(w));
#else
    Ints products;
    __asm__("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(sum), "=&x"(products) : "x"(a), PREQUANT_WEIGHTS(w));
#endif
}

// sum = the first step of a run.
inline void start_bytes(Ints& sum, const Ints& a, const Ints& w) {
#if PREQUANT_AVX2 && !PREQUANT_VNNI
    __asm__("vpmaddubsw %2, %1, %0" : "=x"(sum) : "x"(a), PREQUANT_WEIGHTS(w));
#else
    sum = Ints{};
    dot_bytes(sum, a, w);
#endif
}

// dot_words and dot_bytes with weights that were just made and are in a register.
inline void dot_words_in_registers(Ints& sum, const Ints& a, const Ints& w) {
#if PREQUANT_AVX512
    dot_words(sum, a, w);
#elif PREQUANT_VNNI
    __asm__("%{vex%} vpdpwssd %2, %1, %0" : "+x"(sum) : "x"(a), "x"(w));
#else
    Ints product;
    __asm__("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "=&x"(product) : "x"(a), "x"(w));
#endif
}

inline void dot_bytes_in_registers(Ints& sum, const Ints& a, const Ints& w) {
#if PREQUANT_AVX512
    dot_bytes(sum, a, w);
#elif PREQUANT_VNNI
    __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(a), "x"(w));
#else
    Ints products;
    __asm__("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(sum), "=&x"(products) : "x"(a), "x"(w));
#endif
}
#endif
#endif

// total += the sums of a run of dot_bytes.
inline void add_run(Ints& total, const Ints& run) {
#if PREQUANT_AVX2 && !PREQUANT_VNNI
    total += reinterpret_cast<Ints>(_mm256_madd_epi16(reinterpret_cast<__m256i>(run), _mm256_set1_epi16(1)));
#else
    total += run;
#endif
}

#undef PREQUANT_WEIGHTS

// Four bytes at p in every lane.
inline Ints broadcast_lane(const void* p) {
    int32_t lane;
    std::memcpy(&lane, p, sizeof lane);
    return broadcast(lane);
}

}  // namespace prequant::PREQUANT_LEVEL
