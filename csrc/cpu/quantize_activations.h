// 8-bit min-max codes of x (M, K), one range a row or one for all, and the sums of the codes of each group.
//                                                                               Meaning: reference.quantize_activations
//   lo = min(min x, 0), hi = max(max x, 0), scale = hi/256 - lo/256
//   z = clip(rint(-lo * (1/scale)), 0, 255), q = clip(rint(x * (1/scale)) + z, 0, 255)
//
// Computes   in float32 without contraction: every device makes the same bytes.
// Sums in    int32: K below 2^31 / 255.
// Limited by one read of x (two where it is longer than a span or has one range for all).
#pragma once

#include "numbers.h"

namespace prequant::PREQUANT_LEVEL {

constexpr int64_t kActivationSpan = 4096;

struct Range {
    float low = 0, high = 0;  // of the values and 0
    bool is_finite = true;

    void include(const Range& other) {
        low = smaller(low, other.low);
        high = larger(high, other.high);
        is_finite &= other.is_finite;
    }
};

inline Range range_of(const float* values, int64_t count) {
    Vector low{}, high{}, poison{};  // poison: 0, or NaN where the lane has met NaN or Inf
    const auto include = [&](Vector x) {
        low = x < low ? x : low;
        high = x > high ? x : high;
        poison = multiply_add(x, Vector{}, poison);
    };
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) include(load(values + i));
    if (i < count) {
        float rest[kLanes] = {};
        std::memcpy(rest, values + i, static_cast<size_t>(count - i) * sizeof(float));
        include(load(rest));
    }
    Range range;
    for (int l = 0; l < kLanes; ++l) range.include({low[l], high[l], poison[l] == 0});
    return range;
}

struct Coding {
    float scale, inverse;
    int zero_point;
    bool is_finite;
};

inline Coding coding_of(const Range& range) {
    if (!range.is_finite) return {float_of(kNanBits), 0, 0, false};
    const float scale = range.high / 256 - range.low / 256;
    if (scale < kMinScale) return {1, 0, 0, true};
    const float inverse = 1 / scale;
    return {scale, inverse, static_cast<int>(larger(0.0f, smaller(255.0f, round_even(-range.low * inverse)))), true};
}

// Codes of `count` values, all within the coding's range; returns their sum.
inline int32_t encode(const float* values, int64_t count, const Coding& coding, uint8_t* codes) {
    if (!coding.is_finite) {
        std::memset(codes, 0, static_cast<size_t>(count));
        return 0;
    }
    int32_t sum = 0;
    int64_t i = 0;
#if PREQUANT_AVX512 || PREQUANT_AVX2
    // Conversion rounds half to even as round_even does; the two packs clip to 0 ... 255.
    const __m256 inverse = _mm256_set1_ps(coding.inverse);
    const __m256i zero = _mm256_set1_epi32(coding.zero_point), in_order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    __m256i sums = _mm256_setzero_si256();
    const auto code = [&](int64_t at) {
        return _mm256_add_epi32(_mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(values + at), inverse)), zero);
    };
    for (; i + 32 <= count; i += 32) {
        const __m256i low = _mm256_packs_epi32(code(i), code(i + 8)),
                      high = _mm256_packs_epi32(code(i + 16), code(i + 24));
        const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), in_order);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + i), bytes);
        sums = _mm256_add_epi64(sums, _mm256_sad_epu8(bytes, _mm256_setzero_si256()));
    }
    int64_t parts[4];
    std::memcpy(parts, &sums, sizeof parts);
    sum = static_cast<int32_t>(parts[0] + parts[1] + parts[2] + parts[3]);
#endif
    for (; i < count; ++i) {
        const int code =
            larger(0, smaller(255, static_cast<int>(round_even(values[i] * coding.inverse)) + coding.zero_point));
        codes[i] = static_cast<uint8_t>(code);
        sum += code;
    }
    return sum;
}

inline void quantize_activations(Matrix x, bool per_token, int64_t G, const int64_t* excluded, int64_t size,
                                 uint8_t* codes, float* scale, uint8_t* zero_point, int32_t* sums, Stream) {
    const int64_t M = x.rows, K = x.cols;
    const int64_t group = G > 0 ? K / G : 0;

    // Columns k .. k + count of a row with the excluded ones 0, which is inside every range.
    const auto load = [&](int64_t m, int64_t k, int64_t count, float* scratch) {
        if (excluded == nullptr) return as_floats(x.data, x.dtype, m * K + k, count, scratch);
        load_floats(x.data, x.dtype, m * K + k, count, scratch);
        for (int64_t j = 0; j < size; ++j)
            if (excluded[j] >= k && excluded[j] < k + count) scratch[excluded[j] - k] = 0;
        return static_cast<const float*>(scratch);
    };
    const auto range_of_row = [&](int64_t m, float* scratch) {
        Range range;
        for (int64_t k = 0; k < K; k += kActivationSpan) {
            const int64_t count = smaller(kActivationSpan, K - k);
            range.include(range_of(load(m, k, count, scratch), count));
        }
        return range;
    };
    const auto encode_row = [&](int64_t m, const Coding& coding, float* scratch) {
        for (int64_t g = 0; g < G; ++g) sums[m * G + g] = 0;
        for (int64_t k = 0; k < K; k += kActivationSpan) {
            const int64_t span_end = smaller(K, k + kActivationSpan);
            const float* values = load(m, k, span_end - k, scratch);
            for (int64_t begin = k; begin < span_end;) {
                const int64_t g = begin / group, end = smaller(span_end, (g + 1) * group);
                sums[m * G + g] += encode(values + (begin - k), end - begin, coding, codes + m * K + begin);
                begin = end;
            }
        }
    };

    if (per_token) {
        parallel_for(M, K / 4, [&](int64_t begin, int64_t end) {
            float scratch[kActivationSpan];
            for (int64_t m = begin; m < end; ++m) {
                const Coding coding = coding_of(range_of_row(m, scratch));
                scale[m] = coding.scale;
                zero_point[m] = static_cast<uint8_t>(coding.zero_point);
                encode_row(m, coding, scratch);
            }
        });
        return;
    }
    const int64_t parts = larger<int64_t>(1, smaller(M, num_threads()));
    const Buffer buffer(parts * static_cast<int64_t>(sizeof(Range)));
    Range* ranges = static_cast<Range*>(buffer.data());
    parallel_for(parts, M / parts * K / 8, [&](int64_t begin, int64_t end) {
        float scratch[kActivationSpan];
        for (int64_t part = begin; part < end; ++part) {
            Range range;
            for (int64_t m = M * part / parts; m < M * (part + 1) / parts; ++m) range.include(range_of_row(m, scratch));
            ranges[part] = range;
        }
    });
    for (int64_t part = 1; part < parts; ++part) ranges[0].include(ranges[part]);
    const Coding coding = coding_of(ranges[0]);
    *scale = coding.scale;
    *zero_point = static_cast<uint8_t>(coding.zero_point);
    parallel_for(M, K / 8, [&](int64_t begin, int64_t end) {
        float scratch[kActivationSpan];
        for (int64_t m = begin; m < end; ++m) encode_row(m, coding, scratch);
    });
}

}  // namespace prequant::PREQUANT_LEVEL
