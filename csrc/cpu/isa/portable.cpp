// The CPU kernels for any CPU.
#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include "../parallel.h"
#include "level.h"

#define PREQUANT_LEVEL portable
#define PREQUANT_AVX512 0
#define PREQUANT_AVX2 0
#define PREQUANT_VNNI 0
#include "../kernels.inl"

namespace prequant {

const Kernels& portable_kernels() { return portable::kKernels; }

}  // namespace prequant
