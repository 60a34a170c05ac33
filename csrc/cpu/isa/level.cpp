#include "level.h"

#ifdef __x86_64__
#include <cpuid.h>
#endif

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace prequant {

namespace {

struct Level {
    const char* name;
    bool (*is_available)();
    const Kernels& (*kernels)();
};

#ifdef __x86_64__
// Two features that the compilers' __builtin_cpu_supports does not know by name in every version; with AVX2 the system
// saves the registers.
bool has_f16c() {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
}

bool has_avxvnni() {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c(); }
#endif

// Best first. __builtin_cpu_supports also asks whether the operating system saves the registers.
constexpr Level kLevels[] = {
#ifdef __x86_64__
    {"avx512",
     [] {
         return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
     },
     &avx512_kernels},
    {"avxvnni", [] { return has_avx2() && has_avxvnni(); }, &avxvnni_kernels},
    {"avx2", has_avx2, &avx2_kernels},
#endif
    {"portable", [] { return true; }, &portable_kernels},
};

std::string available() {
    std::string names;
    for (const Level& level : kLevels)
        if (level.is_available()) names += (names.empty() ? "" : ", ") + std::string(level.name);
    return names;
}

const Level& choose() {
    const char* wanted = std::getenv("PREQUANT_ISA");
    for (const Level& level : kLevels) {
        if (wanted == nullptr || *wanted == '\0') {
            if (level.is_available()) return level;
        } else if (std::strcmp(wanted, level.name) == 0) {
            if (level.is_available()) return level;
            throw std::runtime_error(std::string("PREQUANT_ISA=") + wanted +
                                     " names a level that this CPU lacks; available: " + available());
        }
    }
    throw std::runtime_error(std::string("PREQUANT_ISA must be one of ") + available() + ", got " + wanted);
}

const Level& level() {
    static const Level& chosen = choose();
    return chosen;
}

}  // namespace

const char* isa_level_name() { return level().name; }

const Kernels& cpu_kernels() { return level().kernels(); }

}  // namespace prequant
