// Mean, population standard deviation, minimum and maximum of each block of consecutive weights.
//                                                                                       Meaning: reference.weight_stats
//
//   block    tile 0 (4096 elements) | tile 1 | ...        Tiles are merged in index order (Chan et al.).
//   tile     lane   0  1 ... 31 |  0  1 ... 31 | ...      Lane l adds its elements in turn; then the upper half of the
//                                                         lanes is added to the lower half until one is left.
//
// Sums in    float64, in this order and without contraction: every device makes the same bits.
// Limited by one read of the weight.
#pragma once

#include "numbers.h"

namespace prequant::PREQUANT_LEVEL {

constexpr int kStatsLanes = 32;

struct TileStats {
    double mean, squares, minimum, maximum;  // squares: sum of (w - mean)^2
};

inline double fold_lanes(double* lanes) {
    for (int width = kStatsLanes / 2; width > 0; width /= 2)
        for (int l = 0; l < width; ++l) lanes[l] += lanes[l + width];
    return lanes[0];
}

inline TileStats tile_stats(const float* tile, int64_t size) {
    double lanes[kStatsLanes] = {};
    float lowest[kStatsLanes], highest[kStatsLanes], poison[kStatsLanes];  // poison: NaN where the lane has met one
    for (int l = 0; l < kStatsLanes; ++l) lowest[l] = highest[l] = poison[l] = tile[0];
    const auto add = [&](const float* row, int count) {
        for (int l = 0; l < count; ++l) {
            lanes[l] += static_cast<double>(row[l]);
            lowest[l] = row[l] < lowest[l] ? row[l] : lowest[l];
            highest[l] = row[l] > highest[l] ? row[l] : highest[l];
            poison[l] = row[l] == row[l] ? poison[l] : row[l];
        }
    };
    const int64_t whole = size / kStatsLanes * kStatsLanes;
    for (int64_t i = 0; i < whole; i += kStatsLanes) add(tile + i, kStatsLanes);
    add(tile + whole, static_cast<int>(size - whole));

    TileStats stats;
    stats.minimum = lowest[0], stats.maximum = highest[0];
    for (int l = 0; l < kStatsLanes; ++l) {
        stats.minimum = smaller<double>(stats.minimum, lowest[l]);
        stats.maximum = larger<double>(stats.maximum, highest[l]);
    }
    for (int l = 0; l < kStatsLanes; ++l)
        if (poison[l] != poison[l]) stats.minimum = stats.maximum = poison[l];
    stats.mean = fold_lanes(lanes) / static_cast<double>(size);

    const auto add_square = [&](const float* row, int count) {
        for (int l = 0; l < count; ++l) {
            const double deviation = static_cast<double>(row[l]) - stats.mean;
            lanes[l] += deviation * deviation;
        }
    };
    for (int l = 0; l < kStatsLanes; ++l) lanes[l] = 0;
    for (int64_t i = 0; i < whole; i += kStatsLanes) add_square(tile + i, kStatsLanes);
    add_square(tile + whole, static_cast<int>(size - whole));
    stats.squares = fold_lanes(lanes);
    return stats;
}

// The statistics of the tiles merged so far.
struct MergedStats {
    double mean = 0, squares = 0, minimum = 0, maximum = 0;
    int64_t count = 0;

    void merge(const TileStats& tile, int64_t size) {
        const double delta = tile.mean - mean, share = static_cast<double>(size) / static_cast<double>(count + size);
        mean = mean + delta * share;
        squares = squares + (tile.squares + delta * delta * (static_cast<double>(count) * share));
        minimum = count == 0 || tile.minimum != tile.minimum || tile.minimum < minimum ? tile.minimum : minimum;
        maximum = count == 0 || tile.maximum != tile.maximum || tile.maximum > maximum ? tile.maximum : maximum;
        count += size;
    }
};

inline void weight_stats(Matrix weight, int64_t block_size, double* mean, double* std, double* minimum, double* maximum,
                         Stream) {
    const int64_t elements = weight.rows * weight.cols, blocks = block_size ? elements / block_size : 0,
                  tiles = ceil_div(block_size, kStatsTile);
    const auto stats_of = [&](int64_t block, int64_t t) {
        float scratch[kStatsTile];
        const int64_t size = smaller(kStatsTile, block_size - t * kStatsTile);
        return tile_stats(as_floats(weight.data, weight.dtype, block * block_size + t * kStatsTile, size, scratch),
                          size);
    };
    const auto size_of_tile = [&](int64_t t) { return smaller(kStatsTile, block_size - t * kStatsTile); };
    const auto write = [&](int64_t block, const MergedStats& merged) {
        mean[block] = merged.mean;
        std[block] = __builtin_sqrt(merged.squares / static_cast<double>(merged.count));
        minimum[block] = merged.minimum;
        maximum[block] = merged.maximum;
    };
    if (blocks >= 4 * num_threads()) {  // which threads share the work does not change a bit of the result
        parallel_for(blocks, block_size, [&](int64_t begin, int64_t end) {
            for (int64_t block = begin; block < end; ++block) {
                MergedStats merged;
                for (int64_t t = 0; t < tiles; ++t) merged.merge(stats_of(block, t), size_of_tile(t));
                write(block, merged);
            }
        });
        return;
    }
    constexpr int64_t kWave = 1024;  // tiles at a time, so that their statistics are 32 KiB
    TileStats wave[kWave];
    for (int64_t block = 0; block < blocks; ++block) {
        MergedStats merged;
        for (int64_t first = 0; first < tiles; first += kWave) {
            const int64_t count = smaller(kWave, tiles - first);
            parallel_for(count, kStatsTile, [&](int64_t begin, int64_t end) {
                for (int64_t i = begin; i < end; ++i) wave[i] = stats_of(block, first + i);
            });
            for (int64_t i = 0; i < count; ++i) merged.merge(wave[i], size_of_tile(first + i));
        }
        write(block, merged);
    }
}

}  // namespace prequant::PREQUANT_LEVEL
