// The instruction-set levels of the CPU kernels: one table each, one of them chosen once per process.
//
//   portable   plain C++, any CPU
//   avx2       AVX2, FMA, F16C (x86-64)
//   avxvnni    the same with AVX-VNNI
//   avx512     AVX512-F/BW/VL/DQ, VNNI, FMA, F16C
//
// The best level that the CPU has is used; the environment variable PREQUANT_ISA names another one.
// To add a level: a file next to portable.cpp that sets PREQUANT_LEVEL and the three switches, a declaration here, a
// row in level.cpp's table.
#pragma once

#include "../../kernels.h"

namespace prequant {

// Throws std::runtime_error where PREQUANT_ISA names no level, or one that this CPU lacks.
const char* isa_level_name();

const Kernels& portable_kernels();
#ifdef __x86_64__
const Kernels& avx2_kernels();
const Kernels& avxvnni_kernels();
const Kernels& avx512_kernels();
#endif

}  // namespace prequant
