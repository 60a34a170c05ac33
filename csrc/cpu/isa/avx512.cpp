// The CPU kernels for AVX512-F/BW/VL/DQ with VNNI.
//
// Every header from elsewhere comes before the target pragma: an inline function of theirs that was compiled for
// AVX-512 could be the copy that the linker keeps for the whole library, and crash an older CPU. For the same reason
// the kernels call no std:: template.
#ifdef __x86_64__

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../parallel.h"
#include "level.h"

#ifdef PREQUANT_EMULATED_ISA  // a test library for a CPU without AVX-512: immintrin.h is csrc/emulator/isa's
#elif defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // false alarms of GCC 12 in its own intrinsics (bug 105593)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c,prefer-vector-width=512")
#endif

#define PREQUANT_LEVEL avx512
#define PREQUANT_AVX512 1
#define PREQUANT_AVX2 0
#define PREQUANT_VNNI 1
#include "../kernels.inl"

namespace prequant {

const Kernels& avx512_kernels() { return avx512::kKernels; }

}  // namespace prequant

#if defined(__clang__) && !defined(PREQUANT_EMULATED_ISA)
#pragma clang attribute pop
#endif

#endif
