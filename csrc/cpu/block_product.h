// Float activations times integer weights as an integer product of blocks of int16 (block_rows.h).
//
//   sums           += float(S value w) * step      after each block (or group of the weight); a panel of words is built
//                                                  for it
//   few            up to kFewTokens rows of a forward product: no panel (few_tokens.h)
//
// Error      of a result, in addition to that of float32: at most the sum over the blocks of step / 2 * S|w|, w as the
//            weight is in the panel; that is less than 2^-15 * S over blocks of max|a| * S|ŵ|. A block whose values
//            vary a thousandfold loses nothing of its neighbours.
// Sums in    int32 in a block, float32 over the blocks in the order of depth.
// Scratch    rows of a as int16, at most about 1 MiB for a call, and a task's.
// Limited by the integer multiply-adds from M of about 16; below by building panels.
#pragma once

#include "few_tokens.h"
#include "outlier_side.h"

namespace prequant::PREQUANT_LEVEL {

constexpr int64_t kBlockRows = 256;  // of a task
constexpr int64_t kBlockPanelBytes = (kBlock / 2 + 2) * kStepBytes;  // 2: a quad cut by a group's edge
constexpr int64_t kBlockTaskBytes =
    kBlockPanelBytes + OutlierSide::kScratchBytes + kBlockRows * kPanelColumns * static_cast<int64_t>(sizeof(float));

// The weight of the product, as a type with
//   kInQuads                                     whether the rows of a meet its panels in the order of quads
//                                                (weight_panel.h)
//   columns()                                    of the result
//   factors()                                    what the columns of a are multiplied with before they are rounded,
//                                                or null
//   segment_end(begin)                           the first depth after `begin` with other scales
//   panel(column, begin, end, words, scales)     makes the words of depth begin .. end; true: their sums are to be
//                                                multiplied with `scales`
//   column_scales(column, scales)                true: so are the whole sums
//   few(column, rows, a, sums)                   makes the sums of a few rows without a panel, or returns false
template <typename Operand>
inline void block_product(const Matrix& a, const Operand& weight, const OutlierSide& outlier_side, const float* bias,
                          const MutableMatrix& out) {
    const int64_t columns = weight.columns(), r = outlier_side.r();
    const int64_t M = a.rows, depth = a.cols, panels = ceil_div(columns, kPanelColumns);
    if (M == 0 || columns == 0) return;
    const int64_t blocks = ceil_div(depth, kBlock), stride = blocks * kBlock;
    const int64_t rows_at_once =
        smaller(M, larger<int64_t>(8, (int64_t{1} << 20) / (2 * stride + 4 * (blocks + r) + 1)));
    const Buffer values(rows_at_once * stride * 2), steps(rows_at_once * blocks * 4),
        side_buffer(outlier_side.side_bytes(rows_at_once));
    const BlockRows rounded{static_cast<int16_t*>(values.data()), static_cast<float*>(steps.data()), stride, blocks};
    float* const side = static_cast<float*>(side_buffer.data());
    for (int64_t m0 = 0; m0 < M; m0 += rows_at_once) {
        const int64_t here = smaller(rows_at_once, M - m0);
        outlier_side.prepare({a, {}}, m0, here, side);
        round_rows(a, m0, here, weight.factors(), Operand::kInQuads, rounded);
        const int64_t row_blocks = ceil_div(here, kBlockRows), rows_a_task = ceil_div(here, row_blocks);
        parallel_for(
            row_blocks * panels, (rows_a_task + 6) * depth * kPanelColumns / 48, [&](int64_t task, int64_t task_end) {
                char* const panel = static_cast<char*>(thread_scratch(kBlockTaskBytes));
                float* const scratch = reinterpret_cast<float*>(panel + kBlockPanelBytes);
                float* const sums = scratch + OutlierSide::kScratchBytes / 4;
                for (; task < task_end; ++task) {
                    const int64_t block = task / panels * rows_a_task, column = task % panels * kPanelColumns;
                    const int64_t rows = smaller(rows_a_task, here - block),
                                  width = smaller<int64_t>(kPanelColumns, columns - column);
                    const bool is_few = here == M && weight.few(column, M, rounded, sums);
                    if (!is_few) std::memset(sums, 0, static_cast<size_t>(rows * kPanelColumns) * sizeof(float));
                    for (int64_t k = 0; !is_few && k < depth;) {
                        const int64_t end = smaller(smaller(depth, (k / kBlock + 1) * kBlock), weight.segment_end(k)),
                                      quad = k / kQuad * kQuad;
                        alignas(64) float segment_scales[kPanelColumns];
                        const bool has_scales = weight.panel(column, k, end, panel, segment_scales);
                        const float* const row_steps = rounded.steps + block * blocks + k / kBlock;
                        const char* const from = reinterpret_cast<const char*>(rounded.values + block * stride + quad);
                        const int64_t count = ceil_div(end - quad, kQuad) * 2;
                        if (has_scales)
                            multiply_integer_panel<WordProduct>(
                                rows, count, from, stride * 2, panel, [&](int64_t i, int64_t c, Ints sum) {
                                    float* const total = sums + i * kPanelColumns + c;
                                    store(total,
                                          multiply_add(to_floats(sum),
                                                       load(segment_scales + c) * broadcast(row_steps[i * blocks]),
                                                       load(total)));
                                });
                        else
                            multiply_integer_panel<WordProduct>(
                                rows, count, from, stride * 2, panel, [&](int64_t i, int64_t c, Ints sum) {
                                    float* const total = sums + i * kPanelColumns + c;
                                    store(total,
                                          multiply_add(to_floats(sum), broadcast(row_steps[i * blocks]), load(total)));
                                });
                        k = end;
                    }
                    alignas(64) float scales[kPanelColumns];
                    if (weight.column_scales(column, scales))
                        for (int64_t i = 0; i < rows; ++i)
                            for (int64_t c = 0; c < kPanelColumns; c += kLanes)
                                store(sums + i * kPanelColumns + c,
                                      load(sums + i * kPanelColumns + c) * load(scales + c));
                    outlier_side.add(rows, column, side + block * r, scratch, sums);
                    for (int64_t i = 0; i < rows; ++i) {
                        float* const row = sums + i * kPanelColumns;
                        for (int64_t c = 0; bias && c < width; ++c) row[c] += bias[column + c];
                        store_floats(row, width, out.data, out.dtype, (m0 + block + i) * columns + column);
                    }
                }
            });
    }
}

}  // namespace prequant::PREQUANT_LEVEL
