// dscale[n, g] = sum over m of dy[m, n] * (sum over k in g of x[m, k] (code - zero_point)[n, k])
//                                                                                         Meaning: reference.scale_grad
//
//   The inner sums are the forward product of one group with scale 1, made tile by tile (256 tokens x kPanelColumns
//   rows) and met with dy there: neither they nor the dense (N, K) gradient ever exist as a whole.
//
// Sums in    float32 over k, float64 over m, in the order of M whatever the threads.
// Limited by float32 multiply-adds.
#pragma once

#include "activation_rows.h"
#include "weight_panel.h"

namespace prequant::PREQUANT_LEVEL {

inline void scale_grad(Matrix grad_y, Matrix x, Activations codes, Weight weight, float* gradient, Stream) {
    constexpr int64_t kRows = 256, kDepth = kPanelDepth;
    const ActivationRows activations{x, codes};
    const int64_t M = grad_y.rows, N = weight.N, K = weight.K, G = weight.G, size = K / G;
    weight.scale = nullptr;
    parallel_for(ceil_div(N, kPanelColumns), M * K, [&](int64_t begin, int64_t end) {
        float* const block = static_cast<float*>(
            thread_scratch((kRows * kDepth + (kDepth + kRows) * kPanelColumns) * static_cast<int64_t>(sizeof(float)) +
                           kWordPanelBytes + 2 * kStepBytes));
        float* const panel = block + kRows * kDepth;
        float* const sums = panel + kDepth * kPanelColumns;
        char* const words = reinterpret_cast<char*>(sums + kRows * kPanelColumns);
        for (int64_t task = begin; task < end; ++task) {
            const int64_t n = task * kPanelColumns, columns = smaller<int64_t>(kPanelColumns, N - n);
            for (int64_t g = 0; g < G; ++g) {
                double total[kPanelColumns] = {};
                for (int64_t m = 0; m < M; m += kRows) {
                    const int64_t rows = smaller(kRows, M - m);
                    std::memset(sums, 0, static_cast<size_t>(rows * kPanelColumns) * sizeof(float));
                    for (int64_t k = g * size; k < (g + 1) * size; k += kDepth) {
                        const int64_t count = smaller(kDepth, (g + 1) * size - k);
                        for (int64_t i = 0; i < rows; ++i) {
                            const float* row = activations.load(m + i, k, count, block + i * kDepth);
                            if (row != block + i * kDepth)
                                std::memcpy(block + i * kDepth, row, static_cast<size_t>(count) * sizeof(float));
                        }
                        forward_panel(weight, n, k, count, panel, words);
                        for (int64_t c = 0; c < kPanelColumns; c += kTileColumns)
                            multiply_panel<false>(rows, count, block, kDepth, panel + c, kPanelColumns, sums + c,
                                                  kPanelColumns);
                    }
                    float grad_scratch[kPanelColumns];
                    for (int64_t i = 0; i < rows; ++i) {
                        const float* grad =
                            as_floats(grad_y.data, grad_y.dtype, (m + i) * N + n, columns, grad_scratch);
                        for (int64_t c = 0; c < columns; ++c)
                            total[c] += static_cast<double>(grad[c]) * static_cast<double>(sums[i * kPanelColumns + c]);
                    }
                }
                for (int64_t c = 0; c < columns; ++c) gradient[(n + c) * G + g] = static_cast<float>(total[c]);
            }
        }
    });
}

}  // namespace prequant::PREQUANT_LEVEL
