// The CPU kernels for AVX2 with FMA and F16C. See avx512.cpp for why every header is before the pragma.
#ifdef __x86_64__

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../parallel.h"
#include "level.h"

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define PREQUANT_LEVEL avx2
#define PREQUANT_AVX512 0
#define PREQUANT_AVX2 1
#define PREQUANT_VNNI 0
#include "../kernels.inl"

namespace prequant {

const Kernels& avx2_kernels() { return avx2::kKernels; }

}  // namespace prequant

#ifdef __clang__
#pragma clang attribute pop
#endif

#endif
