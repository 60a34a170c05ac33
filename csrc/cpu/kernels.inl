// Every CPU kernel and their table, compiled once for each level: isa/<level>.cpp sets PREQUANT_LEVEL, the namespace,
// and PREQUANT_AVX512.
#include "dequantize.h"
#include "embedding.h"
#include "linear_dx.h"
#include "linear_w4a16.h"
#include "linear_w4a8.h"
#include "outlier_counts.h"
#include "outlier_grad.h"
#include "pack.h"
#include "prepack.h"
#include "quantize_activations.h"
#include "quantize_pack.h"
#include "scale_grad.h"
#include "scatter_outlier.h"
#include "select_outlier_dims.h"
#include "weight_stats.h"

namespace prequant::PREQUANT_LEVEL {

constexpr Kernels kKernels = {
    .linear_reads_prepacked = true,
    .scale_grad_reads_prepacked = true,
    .prefers_dense = nullptr,
    .weight_stats = weight_stats,
    .outlier_counts = outlier_counts,
    .select_outlier_dims = select_outlier_dims,
    .quantize_pack = quantize_pack,
    .pack = pack,
    .unpack = unpack,
    .prepack = prepack,
    .unprepack = unprepack,
    .dequantize = dequantize,
    .scatter_outlier_ = scatter_outlier_,
    .quantize_activations = quantize_activations,
    .embedding = embedding,
    .linear_w4a16 = linear_w4a16,
    .linear_w4a8 = linear_w4a8,
    .linear_dx = linear_dx,
    .outlier_grad = outlier_grad,
    .scale_grad = scale_grad,
};

}  // namespace prequant::PREQUANT_LEVEL
