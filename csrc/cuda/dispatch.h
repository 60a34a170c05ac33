// Which kernel makes a product with a packed weight: one table, read from the top. Host code; no CUDA but two queries.
#pragma once

#ifdef __CUDACC__
#include <cuda_runtime_api.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <stdexcept>
#include <string>

#include "../kernels.h"

namespace prequant::cuda {

struct Gpu {
    int sm;               // 75 for compute capability 7.5
    int multiprocessors;  // that blocks are spread over
};

// The current GPU. Under emulation an A100, unless PREQUANT_EMULATED_SM and PREQUANT_EMULATED_MULTIPROCESSORS say
// otherwise.
inline Gpu current_gpu() {
#ifdef __CUDACC__
    int device = 0, major = 0, minor = 0, multiprocessors = 0;
    const auto check = [](cudaError_t error) {
        if (error != cudaSuccess)
            throw std::runtime_error(std::string("CUDA could not describe the current GPU: ") +
                                     cudaGetErrorString(error));
    };
    check(cudaGetDevice(&device));
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
    check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
    return {major * 10 + minor, multiprocessors};
#else
    const auto setting = [](const char* name, int otherwise) {
        const char* text = std::getenv(name);
        return text == nullptr ? otherwise : std::atoi(text);
    };
    return {setting("PREQUANT_EMULATED_SM", 80), setting("PREQUANT_EMULATED_MULTIPROCESSORS", 108)};
#endif
}

enum class Regime {
    simt,    // simt.cuh: plain arithmetic, for what tensor cores do not multiply
    vector,  // gemv.cuh: W streams through registers, tokens are the 8 columns of an mma
    slim,    // tiles of 16 tokens
    wide,    // tiles of 64 tokens
    dense,   // dequantize once, then torch's matrix product
};

struct Rule {
    int from_sm, to_sm;
    int64_t tokens, weights;  // at most: M, and N * K
    Regime regime;
};

constexpr int64_t kAny = std::numeric_limits<int64_t>::max();

// The first rule that fits. M > 8 fills the 8 columns; M > 16 would read the weight twice in slim tiles, which only
// small weights forgive: a 768 x 768 one has no more than 3 wide tiles. Past the last rule the product is bound by
// arithmetic, where torch's own kernels are better even with the dense weight written and read once more; on the
// data-center chips of 2022 and later from 256 tokens on, because the warp-level mma that these kernels use reaches
// about 60 % of what torch's get from the chip.
constexpr Rule kRules[] = {
    {0, 999, 8, kAny, Regime::vector}, {0, 999, 16, kAny, Regime::slim},   {0, 999, 64, int64_t{1} << 20, Regime::slim},
    {0, 89, 512, kAny, Regime::wide},  {90, 109, 256, kAny, Regime::wide}, {110, 999, 512, kAny, Regime::wide},
};

constexpr Regime regime_of(int64_t M, int64_t weights, int sm) {
    for (const Rule& rule : kRules)
        if (sm >= rule.from_sm && sm <= rule.to_sm && M <= rule.tokens && weights <= rule.weights) return rule.regime;
    return Regime::dense;
}

// Slots of the ring that copies to shared memory run ahead in. sm_75 copies through registers: more than two slots
// bring nothing, and do not fit.
constexpr int ring_slots(int sm) { return sm < 80 ? 2 : 4; }

// Parts that the reduction of `steps` is cut into, so that `tiles` of the result fill `blocks` places. Each part costs
// a float32 copy of the result and at least as many steps as the ring needs to fill.
struct Split {
    int parts, steps;  // steps of each part but the last
};

constexpr Split split_reduction(int64_t tiles, int64_t steps, int64_t blocks) {
    constexpr int64_t kFewestSteps = 4, kMostParts = 16;
    const int64_t wanted =
        std::clamp<int64_t>(std::min(blocks / std::max<int64_t>(tiles, 1), steps / kFewestSteps), 1, kMostParts);
    const int64_t each = std::max<int64_t>(ceil_div(steps, wanted), 1);
    return {static_cast<int>(std::max<int64_t>(ceil_div(steps, each), 1)), static_cast<int>(each)};
}

// The tensor-core kernels of linear_w4a16 and linear_dx multiply 16-bit floats by chunks of 64 columns that share a
// scale.
inline bool takes_tensor_cores(const Weight& weight, Dtype dtype, int sm) {
    if (dtype == Dtype::float32) return false;                            // they would round it to 11 bits
    if (dtype == Dtype::bfloat16 && sm < 80) return false;                // no bfloat16 before sm_80
    return weight.G == 1 || weight.K / weight.G % kChunkColumns == 0;     // else two scales in a chunk
}

// Plain arithmetic takes about four instructions for a code and one more for each token: up to 3 tokens that is worth
// it.
constexpr int64_t kSimtTokens = 3, kSimtGroup = 8;  // a lane has two columns of every 8, which must share a scale

inline Regime forward_regime(int64_t M, const Weight& weight, Dtype dtype, int sm) {
    if (takes_tensor_cores(weight, dtype, sm)) return regime_of(M, weight.N * weight.K, sm);
    return M <= kSimtTokens && (weight.G == 1 || weight.K / weight.G % kSimtGroup == 0) ? Regime::simt : Regime::dense;
}

inline Regime backward_regime(int64_t M, const Weight& weight, Dtype dtype, int sm) {
    return takes_tensor_cores(weight, dtype, sm) ? regime_of(M, weight.N * weight.K, sm) : Regime::dense;
}

inline bool prefers_dense(int64_t M, const Weight& weight, Dtype dtype, bool is_backward) {
    return M > 0 &&
           (is_backward ? backward_regime : forward_regime)(M, weight, dtype, current_gpu().sm) == Regime::dense;
}

}  // namespace prequant::cuda
