// out (M, columns) = a (M, depth) times a matrix that exists only as float32 panels made on the fly: linear_w4a16,
// linear_dx.
//
//   task       256 rows of a x kPanelColumns columns of out; a thread takes a run of tasks, as strips of up to 8
//              panels of the same rows
//   strip      for each block of 512 in depth: a's block as float32 (copied unless it is that already), then for
//              each panel build (512 x 32 floats, 64 KiB) and multiply into the strip's sums
//
// Sums in    float32, in the order of depth, whatever the threads.
// Scratch    below 1 MiB a thread: a's block 512 KiB, the sums 256 KiB, a panel 64 KiB, and the builder's words 32 KiB.
#pragma once

#include "tile.h"
#include "weight_panel.h"

namespace prequant::PREQUANT_LEVEL {

constexpr int64_t kProductRows = 256;  // rows of a in a task: a panel is built once for so many
constexpr int64_t kProductDepth = kPanelDepth;
constexpr int64_t kStripPanels = 8;

// build(column, columns, begin, count, panel, words) fills panel[k * kPanelColumns + i] for depths begin .. begin +
// count and columns column .. column + columns, finite for i >= columns; words is scratch as in weight_panel.h.
template <typename Build>
inline void panel_product(const Matrix& a, int64_t columns, const float* bias, const MutableMatrix& out,
                          const Build& build) {
    const int64_t M = a.rows, depth = a.cols;
    const int64_t panels = ceil_div(columns, kPanelColumns), row_blocks = ceil_div(M, kProductRows);
    const int64_t rows_a_task = ceil_div(M, row_blocks > 0 ? row_blocks : 1);
    parallel_for(
        row_blocks * panels, (rows_a_task + 8) * depth * kPanelColumns / 64, [&](int64_t task, int64_t task_end) {
            constexpr int64_t kBlockFloats = kProductRows * kProductDepth,
                              kSumFloats = kProductRows * kStripPanels * kPanelColumns,
                              kPanelFloats = kProductDepth * kPanelColumns;
            float* const block = static_cast<float*>(
                thread_scratch((kBlockFloats + kSumFloats + kPanelFloats) * 4 + kWordPanelBytes + 2 * kStepBytes));
            float* const sums = block + kBlockFloats;
            float* const panel = sums + kSumFloats;
            char* const words = reinterpret_cast<char*>(panel + kPanelFloats);
            while (task < task_end) {
                const int64_t m = task / panels * rows_a_task, first = task % panels;
                const int64_t rows = smaller(rows_a_task, M - m),
                              count = smaller(kStripPanels, smaller(panels - first, task_end - task));
                const int64_t width = count * kPanelColumns, column = first * kPanelColumns;
                std::memset(sums, 0, static_cast<size_t>(rows * width) * sizeof(float));
                for (int64_t k = 0; k < depth; k += kProductDepth) {
                    const int64_t height = smaller(kProductDepth, depth - k);
                    const float* source = static_cast<const float*>(a.data) + m * depth + k;
                    int64_t stride = depth;
                    if (a.dtype != Dtype::float32) {
                        for (int64_t i = 0; i < rows; ++i)
                            load_floats(a.data, a.dtype, (m + i) * depth + k, height, block + i * kProductDepth);
                        source = block;
                        stride = kProductDepth;
                    }
                    for (int64_t p = 0; p < count; ++p) {
                        const int64_t begin = column + p * kPanelColumns;
                        build(begin, smaller<int64_t>(kPanelColumns, columns - begin), k, height, panel, words);
                        for (int64_t c = 0; c < kPanelColumns; c += kTileColumns)
                            multiply_panel<false>(rows, height, source, stride, panel + c, kPanelColumns,
                                                  sums + p * kPanelColumns + c, width);
                    }
                }
                const int64_t written = smaller(width, columns - column);
                for (int64_t i = 0; i < rows; ++i) {
                    float* row = sums + i * width;
                    for (int64_t j = 0; bias && j < written; ++j) row[j] += bias[column + j];
                    store_floats(row, written, out.data, out.dtype, (m + i) * columns + column);
                }
                task += count;
            }
        });
}

}  // namespace prequant::PREQUANT_LEVEL
