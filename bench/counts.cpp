// One kernel of one level (-DCOUNTS_LEVEL=portable) on random numbers, without Python or torch: bench/counts.py counts
// its instructions.
//
//     counts <operator> <M> <N> <K>        called twice; the second call is made by measured()
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>
#include <vector>

#include "../csrc/cpu/isa/level.h"
#include "../csrc/cpu/parallel.h"

#define COUNTS_JOIN(level, suffix) level##suffix
#define COUNTS_TABLE(level) COUNTS_JOIN(level, _kernels)

namespace prequant {

// In place of cpu/parallel.cpp: the calling thread does everything.
static void* allocate(int64_t bytes) { return ::operator new(static_cast<size_t>(bytes), std::align_val_t{64}); }

void parallel_ranges(int64_t tasks, int64_t, void (*run)(int64_t, int64_t, const void*), const void* context) {
    if (tasks > 0) run(0, tasks, context);
}

int64_t num_threads() { return 1; }

void* thread_scratch(int64_t bytes) {
    static void* const data = allocate(int64_t{16} << 20);
    if (bytes > int64_t{16} << 20) std::abort();
    return data;
}

Buffer::Buffer(int64_t bytes) : data_(allocate(bytes)) {}

Buffer::~Buffer() { ::operator delete(data_, std::align_val_t{64}); }

namespace {

constexpr int kContainer = 4, kOutliers = 5;

struct Problem {
    int64_t M, N, K;
    std::vector<float> x, y, dx, values, bias;
    std::vector<uint8_t> packed, prepacked, codes;
    std::vector<int64_t> dims;
    std::vector<float> x_scale;
    std::vector<uint8_t> x_zero_point;
    std::vector<int32_t> x_sums;
    float scale = 0.0625f;
    uint8_t zero_point = 8;

    Problem(const Kernels& kernels, int64_t M, int64_t N, int64_t K)
        : M(M),
          N(N),
          K(K),
          x(M * K),
          y(M * N),
          dx(M * K),
          values(N * kOutliers),
          bias(N),
          packed(N * packed_row_bytes(K, kContainer)),
          codes(M * K),
          x_scale(M),
          x_zero_point(M),
          x_sums(M) {
        uint32_t state = 1;
        const auto next = [&] { return (state = state * 1664525u + 1013904223u) >> 8; };
        const auto fill = [&](std::vector<float>& floats) {
            for (float& value : floats) value = static_cast<float>(next()) * 0x1p-23f - 1;
        };
        fill(x), fill(y), fill(values), fill(bias);
        for (uint8_t& byte : packed) byte = static_cast<uint8_t>(next());
        for (int64_t j = 0; j < kOutliers; ++j) dims.push_back(j * K / kOutliers);
        kernels.quantize_activations({x.data(), Dtype::float32, M, K}, true, 1, nullptr, 0, codes.data(),
                                     x_scale.data(), x_zero_point.data(), x_sums.data(), {});
        if (kernels.linear_reads_prepacked) {
            prepacked.resize(
                static_cast<size_t>(ceil_div(N, kPanelRows) * kPanelRows * (packed_row_bytes(K, kContainer) + 64)));
            kernels.prepack(packed.data(), N, K, kContainer, prepacked.data(), {});
        }
    }

    Weight weight() const {
        const bool is_prepacked = !prepacked.empty();
        return {
            is_prepacked ? prepacked.data() : packed.data(), &scale, &zero_point, N, K, 1, 1, kContainer, is_prepacked};
    }
    Outliers outliers() const { return {dims.data(), values.data(), kOutliers, 1}; }
    Activations activations() const {
        return {codes.data(), x_scale.data(), x_zero_point.data(), x_sums.data(), M, K, true};
    }

    void call(const Kernels& kernels, const std::string& op) {
        const Matrix input{x.data(), Dtype::float32, M, K}, grad_y{y.data(), Dtype::float32, M, N};
        const MutableMatrix output{y.data(), Dtype::float32, M, N}, grad_x{dx.data(), Dtype::float32, M, K};
        if (op == "linear_w4a8") {
            kernels.linear_w4a8(activations(), nullptr, weight(), outliers(), bias.data(), output, {});
        } else if (op == "linear_w4a16") {
            kernels.linear_w4a16(input, weight(), outliers(), bias.data(), false, output, {});
        } else if (op == "linear_dx") {
            kernels.linear_dx(grad_y, weight(), outliers(), false, grad_x, {});
        } else if (op == "quantize_activations") {
            kernels.quantize_activations(input, true, 1, nullptr, 0, codes.data(), x_scale.data(), x_zero_point.data(),
                                         x_sums.data(), {});
        } else {
            std::fprintf(stderr, "counts: no operator %s here\n", op.c_str());
            std::exit(2);
        }
    }
};

}  // namespace

}  // namespace prequant

// Callgrind counts between entry and return of this function, which it finds by name.
extern "C" __attribute__((noinline)) void measured(prequant::Problem& problem, const prequant::Kernels& kernels,
                                                   const std::string& op) {
    problem.call(kernels, op);
}

int main(int count, char** arguments) {
    if (count != 5) {
        std::fprintf(stderr, "usage: counts <operator> <M> <N> <K>\n");
        return 2;
    }
    const prequant::Kernels& kernels = prequant::COUNTS_TABLE(COUNTS_LEVEL)();
    prequant::Problem problem(kernels, std::atoll(arguments[2]), std::atoll(arguments[3]), std::atoll(arguments[4]));
    problem.call(kernels, arguments[1]);
    measured(problem, kernels, arguments[1]);
    return 0;
}
