// The r dimensions with most outliers, ascending; ties go to the larger energy, then to the lower index.
//                                                                                Meaning: reference.select_outlier_dims
#pragma once

#include "numbers.h"

namespace prequant::PREQUANT_LEVEL {

inline void select_outlier_dims(const int64_t* counts, const int64_t* energy, int64_t size, int64_t r, int64_t* dims,
                                Stream) {
    const auto is_worse = [&](int64_t a, int64_t b) {
        return counts[a] != counts[b] ? counts[a] < counts[b] : energy[a] != energy[b] ? energy[a] < energy[b] : a > b;
    };
    if (r == 0) return;
    // `dims` is a heap with the worst of the dimensions kept at its root, so that no other memory is needed.
    const auto sift_down = [&](int64_t i, int64_t count, const auto& goes_up) {
        for (int64_t child; (child = 2 * i + 1) < count; i = child) {
            if (child + 1 < count && goes_up(dims[child + 1], dims[child])) ++child;
            if (!goes_up(dims[child], dims[i])) return;
            const int64_t held = dims[i];
            dims[i] = dims[child];
            dims[child] = held;
        }
    };
    for (int64_t i = 0; i < r; ++i) dims[i] = i;
    for (int64_t i = r / 2; i-- > 0;) sift_down(i, r, is_worse);
    for (int64_t i = r; i < size; ++i) {
        if (!is_worse(dims[0], i)) continue;
        dims[0] = i;
        sift_down(0, r, is_worse);
    }
    const auto is_larger = [](int64_t a, int64_t b) { return a > b; };
    for (int64_t i = r / 2; i-- > 0;) sift_down(i, r, is_larger);
    for (int64_t last = r - 1; last > 0; --last) {
        const int64_t held = dims[0];
        dims[0] = dims[last];
        dims[last] = held;
        sift_down(0, last, is_larger);
    }
}

}  // namespace prequant::PREQUANT_LEVEL
