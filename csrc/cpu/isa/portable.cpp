// The CPU kernels for any CPU.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../parallel.h"
#include "level.h"

#define PREQUANT_LEVEL portable
#define PREQUANT_AVX512 0
#include "../kernels.inl"

namespace prequant {

const Kernels& portable_kernels() { return portable::kKernels; }

}  // namespace prequant
