// In place of cpu/isa/level.cpp in a test library: its one level is the one that -DPREQUANT_EMULATED_ISA names,
// whatever the CPU has and whatever PREQUANT_ISA says.
#include "../../cpu/isa/level.h"

#define PREQUANT_JOIN(name, suffix) name##suffix
#define PREQUANT_TABLE(level) PREQUANT_JOIN(level, _kernels)
#define PREQUANT_QUOTE(name) #name
#define PREQUANT_NAME(level) PREQUANT_QUOTE(level)

namespace prequant {

const Kernels& cpu_kernels() { return PREQUANT_TABLE(PREQUANT_EMULATED_ISA)(); }

const char* isa_level_name() { return PREQUANT_NAME(PREQUANT_EMULATED_ISA); }

}  // namespace prequant
