// What this library was built with and what it uses: "isa=...;cuda=...;arch=...;cpu_ops=...;cuda_ops=...". Read by
// doctor.py.
#include <string>

#include "cpu/isa/level.h"
#include "kernels.h"
#ifdef PREQUANT_CUDA
#include "cuda/cuda.h"
#endif

namespace prequant {

namespace {

// The operators that a table has, separated by commas.
std::string operators(const Kernels& kernels) {
    std::string names;
    const auto entry = [&](const char* name, bool is_present) {
        if (is_present) names += (names.empty() ? "" : ",") + std::string(name);
    };
#define PREQUANT_ENTRY(name) entry(#name, kernels.name != nullptr)
    PREQUANT_ENTRY(weight_stats);
    PREQUANT_ENTRY(outlier_counts);
    PREQUANT_ENTRY(select_outlier_dims);
    PREQUANT_ENTRY(quantize_pack);
    PREQUANT_ENTRY(pack);
    PREQUANT_ENTRY(unpack);
    PREQUANT_ENTRY(prepack);
    PREQUANT_ENTRY(unprepack);
    PREQUANT_ENTRY(dequantize);
    PREQUANT_ENTRY(scatter_outlier_);
    PREQUANT_ENTRY(quantize_activations);
    PREQUANT_ENTRY(embedding);
    PREQUANT_ENTRY(linear_w4a16);
    PREQUANT_ENTRY(linear_w4a8);
    PREQUANT_ENTRY(linear_dx);
    PREQUANT_ENTRY(outlier_grad);
    PREQUANT_ENTRY(scale_grad);
#undef PREQUANT_ENTRY
    // 17 operators, and two entries about them.
    static_assert(sizeof(Kernels) == 19 * sizeof(void (*)()), "list the new operator above");
    return names;
}

}  // namespace

std::string build_info() {
    std::string info = "isa=" + std::string(isa_level_name());
#ifdef PREQUANT_CUDA
    info += ";cuda=" + std::string(cuda::toolkit_version()) + ";arch=" + cuda::architectures();
#else
    info += ";cuda=none;arch=";
#endif
    info += ";cpu_ops=" + operators(cpu_kernels()) + ";cuda_ops=";
#ifdef PREQUANT_CUDA
    info += operators(cuda_kernels());
#endif
    return info;
}

}  // namespace prequant
