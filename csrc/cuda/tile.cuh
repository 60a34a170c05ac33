// What linear_w4a16 and linear_dx share: a block makes one tile of the result,
//     out (M, columns) = x (M, depth) times the weight.
//
//                      columns               A warp makes all rows of its share of the columns, so that it dequantizes
//               warp 0  warp 1  ...  warp 7  a code once. The reduction is marched in steps of kDepth; a ring of slots
//             +-------+-------+- -+-------+  in shared memory holds the next ones. A slot has rows of x, then chunks of
//        rows |       |       |   |       |  the weight:
//             +-------+-------+- -+-------+      x       unit u (8 numbers) of row m lies at u ^ (m % 8): eight rows'
//                                                        units of one column, an ldmatrix, meet all banks
//    slot     [ x | chunks ] [ x | chunks ] ...  chunks  512 bytes each (4 bits), lane by lane: 128-bit loads meet all
//                                                        banks
//
// Rows of x past M, numbers past depth and chunks past the weight's end are copied as zeros, so no product has a
// special case.
#pragma once

#include "outliers.cuh"
#include "words.cuh"

namespace prequant::cuda {

struct Product {
    const void* x;  // rows of `stride` numbers, each row on 16 bytes, and read in units of 16 bytes
    int64_t M, depth, stride;
    Weight weight;
    int group_chunks;  // chunks along K that share a scale; 0: all
    void* out;  // (M, columns)
    int64_t columns;
    bool is_out_wide;  // whether units of 16 bytes of out can be stored
    float* partial;  // (parts, M, columns) where the reduction is cut, else null
    int steps;  // of a part

    // out[m, c] += sum over j < gathered of x[m, dims[j]] values[c * along_column + j * along_outlier]
    const int64_t* dims;
    const float* values;
    int64_t gathered, along_column, along_outlier;
    // out[m, dims[j]] += side[m, j], j < side_columns
    const float* side;
    int64_t side_columns;
    const float* bias;  // or null
};

template <typename T>
__global__ void pad_rows_kernel(const T* __restrict__ x, int64_t columns, int64_t stride, T* __restrict__ padded) {
    const int64_t row = blockIdx.x, column = int64_t(blockIdx.y) * blockDim.x + threadIdx.x;
    if (column < stride) padded[row * stride + column] = column < columns ? x[row * columns + column] : T{};
}

// The product of 16-bit floats x with this weight, without its outliers and bias. Where rows of x do not lie on 16
// bytes, they are copied to rows that do.
inline Product product_of(Matrix x, const Weight& weight, MutableMatrix out, Stream stream) {
    constexpr int64_t kUnit = kVectorBytes / 2;
    if (!is_aligned(weight.packed, kVectorBytes))
        throw std::runtime_error("a prepacked weight must lie on a multiple of 16 bytes: clone() makes one that does");
    Product p{};
    p.x = x.data, p.M = x.rows, p.depth = x.cols, p.stride = x.cols, p.weight = weight, p.out = out.data,
    p.columns = out.cols;
    p.group_chunks = weight.G == 1 ? 0 : static_cast<int>(weight.K / weight.G / kChunkColumns);
    p.is_out_wide = out.cols % kUnit == 0 && is_aligned(out.data, kVectorBytes);
    if (x.rows > 0 && x.cols > 0 && (x.cols % kUnit != 0 || !is_aligned(x.data, kVectorBytes))) {
        constexpr unsigned kThreads = 256;
        p.stride = ceil_div(x.cols, kUnit) * kUnit;
        auto* padded = static_cast<uint16_t*>(stream.scratch(p.M * p.stride * 2));
        launch("pad_rows_kernel", pad_rows_kernel<uint16_t>,
               {.grid = dim3(static_cast<unsigned>(p.M), static_cast<unsigned>(ceil_div(p.stride, kThreads))),
                .block = dim3(kThreads),
                .stream = stream},
               static_cast<const uint16_t*>(x.data), x.cols, p.stride, padded);
        p.x = padded;
    }
    return p;
}

template <int kRows_, int kColumns_, int kDepth_, int kWarps_>
struct Tile {
    static constexpr int kRows = kRows_, kColumns = kColumns_, kDepth = kDepth_, kWarps = kWarps_,
                         kThreads = kWarps * kWarp;
    // Tiles of an mma's result, in a warp.
    static constexpr int kRowTiles = kRows / 16, kWarpColumns = kColumns / kWarps, kColumnTiles = kWarpColumns / 8;
    static constexpr int kUnits = kDepth / 8;  // of a row of x
    static constexpr int kRowBytes = kDepth * 2, kXBytes = kRows * kRowBytes;
    static constexpr int kChunks = kColumns * kDepth / static_cast<int>(kChunkRows * kChunkColumns);
    static_assert(kUnits % 8 == 0 && kRows % 16 == 0 && kThreads % kUnits == 0);

    PREQUANT_HOST_DEVICE static constexpr int slot_bytes(int container) {
        return kXBytes + kChunks * static_cast<int>(chunk_bytes(container));
    }

    // After the last step the ring's memory holds gathered columns and, in their place later, the tile of the result.
    static constexpr int kGatherPitch = 24, kOutPitch = kColumns + 8;  // in numbers: rows then meet different banks
    static constexpr int kGatherBytes = (kRows + kColumns) * kGatherPitch * 2, kColumnBytes = kColumns * 4,
                         kOutBytes = kRows * kOutPitch * 2;
    static constexpr int shared_bytes(int container, int slots) {
        return std::max({slots * slot_bytes(container), kGatherBytes, kColumnBytes, kOutBytes});
    }
};

// Accumulators of a warp: of the rows 16 i .. and the columns 8 q .. of its share, as an mma leaves them.
template <typename TileT>
struct Sums {
    float at[TileT::kRowTiles][TileT::kColumnTiles][4];
};

// A size that a kernel counts down from: beyond int it is as good as endless.
__device__ __forceinline__ int as_int(int64_t size) { return static_cast<int>(size < 0x7fffffff ? size : 0x7fffffff); }

template <typename TileT>
__device__ __forceinline__ int x_offset(int row, int unit) {
    return row * TileT::kRowBytes + (unit ^ (row & 7)) * 16;
}

// Copies rows m0 .. of x to slot after slot, kDepth numbers at a time from k0 on. A thread copies one unit of every
// kAtOnce-th row.
template <typename TileT>
struct CopyX {
    static constexpr int kAtOnce = TileT::kThreads / TileT::kUnits, kTimes = ceil_div(TileT::kRows, kAtOnce);
    static_assert(kAtOnce % 8 == 0 && TileT::kRows % kAtOnce == 0);
    const uint8_t* from;
    int64_t apart;  // bytes between a thread's rows
    int rows, steps, to;  // rows of M from the thread's first on; steps whose unit lies inside depth; offset in a slot

    __device__ __forceinline__ CopyX(const Product& p, int64_t m0, int64_t k0) {
        const int thread = static_cast<int>(threadIdx.x), unit = thread % TileT::kUnits, row = thread / TileT::kUnits;
        from = static_cast<const uint8_t*>(p.x) + ((m0 + row) * p.stride + k0 + unit * 8) * 2;
        apart = kAtOnce * p.stride * 2;
        rows = as_int(p.M - m0 - row), steps = as_int(ceil_div(p.depth - k0 - unit * 8, TileT::kDepth)),
        to = x_offset<TileT>(row, unit);
    }
    __device__ __forceinline__ void operator()(uint8_t* slot) {
        const uint8_t* row = from;
#pragma unroll
        for (int i = 0; i < kTimes; ++i, row += apart)
            cp_async_16(slot + to + i * kAtOnce * TileT::kRowBytes, row, steps > 0 && i * kAtOnce < rows ? 16 : 0);
        from += TileT::kRowBytes, --steps;
    }
};

// Copies a rectangle of kDown x kAcross chunks to slot after slot, from chunk row `down` and chunk column `across` on:
// the next rectangle is to the right of it, or (kIsDownward) below it.
template <typename TileT, int kContainer, int kDown, int kAcross, bool kIsDownward>
struct CopyChunks {
    static constexpr int kBytes = static_cast<int>(chunk_bytes(kContainer)), kChunkUnits = kBytes / 16,
                         kRowUnits = kAcross * kChunkUnits;
    static constexpr int kTimes = kDown * kRowUnits / TileT::kThreads;  // units of a thread
    // Or a row takes several times.
    static constexpr int kRowsAtOnce = TileT::kThreads >= kRowUnits ? TileT::kThreads / kRowUnits : 1;
    static constexpr int kTimesARow = TileT::kThreads >= kRowUnits ? 1 : kRowUnits / TileT::kThreads,
                         kColumnsAtOnce = TileT::kThreads / kChunkUnits;
    static_assert(kDown * kAcross == TileT::kChunks && kDown * kRowUnits % TileT::kThreads == 0 &&
                  TileT::kThreads % kChunkUnits == 0);
    const uint8_t* from;
    int64_t row_bytes;
    int rows, columns, to;  // chunks left from the thread's first on; offset in a slot

    __device__ __forceinline__ CopyChunks(const Weight& weight, int64_t down, int64_t across) {
        const int thread = static_cast<int>(threadIdx.x), unit = thread % kChunkUnits, row = thread / kRowUnits,
                  column = thread % kRowUnits / kChunkUnits;
        const int64_t all_columns = chunks_along(weight.K);
        row_bytes = all_columns * kBytes;
        from = weight.packed + (down + row) * row_bytes + (across + column) * kBytes + unit * 16;
        rows = as_int(ceil_div(weight.N, kChunkRows) - down - row), columns = as_int(all_columns - across - column);
        to = TileT::kXBytes + thread / kChunkUnits * kBytes + chunk_unit<kContainer>(unit) * 16;
    }
    __device__ __forceinline__ void operator()(uint8_t* slot) {
        const uint8_t* row = from;
#pragma unroll
        for (int i = 0; i < kTimes; ++i) {
            const int down = i / kTimesARow * kRowsAtOnce, across = i % kTimesARow * kColumnsAtOnce;
            cp_async_16_evict_first(slot + to + i * kColumnsAtOnce * kBytes, row + across * kBytes,
                                    down < rows && across < columns ? 16 : 0);
            if ((i + 1) % kTimesARow == 0) row += kRowsAtOnce * row_bytes;
        }
        if constexpr (kIsDownward) {
            from += kDown * row_bytes, rows -= kDown;
        } else {
            from += kAcross * kBytes, columns -= kAcross;
        }
    }
};

// A operands of all row tiles of x, numbers 16 step .. of the slot.
template <typename TileT>
__device__ __forceinline__ void load_x(uint32_t (&a)[TileT::kRowTiles][4], const uint8_t* slot, int step) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
    for (int i = 0; i < TileT::kRowTiles; ++i)
        ldmatrix_x4(a[i], slot + x_offset<TileT>(i * 16 + lane % 16, step * 2 + lane / 16));
}

// multiply(step, slot) for each step in turn, with fetch(slot) of the steps in turn run ahead by all but one of the
// slots.
template <typename Fetch, typename Multiply>
__device__ __forceinline__ void march(int steps, int slots, int slot_bytes, Fetch fetch, Multiply multiply) {
    uint8_t* ring = dynamic_shared<uint8_t>();
    for (int s = 0; s < slots - 1; ++s) {
        if (s < steps) fetch(ring + s * slot_bytes);
        cp_async_commit();  // an empty group where nothing is left: waiting counts groups
    }
    int slot = 0, next = slots - 1;
    for (int step = 0; step < steps; ++step) {
        if (slots == 2) {
            cp_async_wait<0>();
        } else {
            cp_async_wait<2>();  // ring_slots() gives 2 or 4
        }
        __syncthreads();  // the step has landed for all; all are done with the slot that is filled next
        if (step + slots - 1 < steps) fetch(ring + next * slot_bytes);
        cp_async_commit();
        multiply(step, ring + slot * slot_bytes);
        slot = slot + 1 == slots ? 0 : slot + 1;
        next = next + 1 == slots ? 0 : next + 1;
    }
    cp_async_wait<0>();
    __syncthreads();  // the ring's memory is free
}

// The outliers of gathered columns: ceil(gathered / 16) more steps of mma, into sums that carry their scale already.
template <typename TileT, typename T>
__device__ __forceinline__ void add_gathered(Sums<TileT>& sums, const Product& p, int64_t m0, int64_t c0) {
    constexpr int kPitch = TileT::kGatherPitch;
    T *gathered = dynamic_shared<T>(), *values = gathered + TileT::kRows * kPitch;  // (rows, 16) of x, (columns, 16)
    const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
    for (int64_t j0 = 0; j0 < p.gathered; j0 += 16) {
        __syncthreads();
        for (int e = thread; e < TileT::kRows * 16; e += TileT::kThreads) {
            const int64_t row = m0 + e / 16, j = j0 + e % 16, k = j < p.gathered ? p.dims[j] : -1;
            gathered[e / 16 * kPitch + e % 16] = row < p.M && k >= 0 && k < p.depth
                                                     ? static_cast<const T*>(p.x)[row * p.stride + k]
                                                     : from_float<T>(0.0f);
        }
        // Neighbouring lanes take neighbouring values, whichever way these lie.
        const auto value = [&](int column, int j) {
            const bool is_inside = c0 + column < p.columns && j0 + j < p.gathered;
            return is_inside ? p.values[(c0 + column) * p.along_column + (j0 + j) * p.along_outlier] : 0.0f;
        };
        if (p.along_column == 1) {
            // A warp takes 8 columns x 4 pairs, which meet 32 banks.
            for (int e = thread; e < TileT::kColumns * 8; e += TileT::kThreads) {
                const int column = e / kWarp % (TileT::kColumns / 8) * 8 + lane % 8,
                          j = e / (TileT::kColumns * 4) * 8 + lane / 8 * 2;
                store(values + column * kPitch + j, pair_of<T>(value(column, j), value(column, j + 1)));
            }
        } else {
            for (int e = thread; e < TileT::kColumns * 16; e += TileT::kThreads)
                values[e / 16 * kPitch + e % 16] = from_float<T>(value(e / 16, e % 16));
        }
        __syncthreads();
        uint32_t a[TileT::kRowTiles][4];
#pragma unroll
        for (int i = 0; i < TileT::kRowTiles; ++i)
            ldmatrix_x4(a[i], gathered + (i * 16 + lane % 16) * kPitch + lane / 16 * 8);
#pragma unroll
        for (int q = 0; q < TileT::kColumnTiles; ++q) {
            const T* from = values + (warp * TileT::kWarpColumns + q * 8 + lane / 4) * kPitch + lane % 4 * 2;
            const uint32_t b[2] = {load<uint32_t>(from), load<uint32_t>(from + 8)};
#pragma unroll
            for (int i = 0; i < TileT::kRowTiles; ++i) mma_m16n8k16<T>(sums.at[i][q], a[i], b);
        }
    }
}

// Calls visit(i, q, r, row, column) for each accumulator of the lane, at[i][q][r].
template <typename TileT, typename Visit>
__device__ __forceinline__ void for_each_sum(Visit visit) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
#pragma unroll
    for (int q = 0; q < TileT::kColumnTiles; ++q)
#pragma unroll
        for (int i = 0; i < TileT::kRowTiles; ++i)
#pragma unroll
            for (int r = 0; r < 4; ++r)
                visit(i, q, r, i * 16 + lane / 4 + r / 2 * 8,
                      warp * TileT::kWarpColumns + q * 8 + lane % 4 * 2 + r % 2);
}

// The outliers of whole columns of the result, from their product made beforehand.
template <typename TileT>
__device__ __forceinline__ void add_side(Sums<TileT>& sums, const Product& p, int64_t m0, int64_t c0) {
    int* which = dynamic_shared<int>();  // j of each column, or -1
    __syncthreads();
    for (int c = static_cast<int>(threadIdx.x); c < TileT::kColumns; c += TileT::kThreads) {
        which[c] = -1;
        for (int64_t j = 0; j < p.side_columns; ++j)
            if (p.dims[j] == c0 + c) which[c] = static_cast<int>(j);
    }
    __syncthreads();
    for_each_sum<TileT>([&](int i, int q, int r, int row, int column) {
        const int j = which[column];
        if (j >= 0 && m0 + row < p.M) sums.at[i][q][r] += p.side[(m0 + row) * p.side_columns + j];
    });
}

// Adds what is not a product with codes, then stores the tile: rounded to T at the very end, or as this part's float32
// share.
template <typename TileT, typename T>
__device__ __forceinline__ void write_tile(Sums<TileT>& sums, const Product& p, int64_t m0, int64_t c0, int64_t part) {
    if (part == 0) {
        if (p.gathered > 0) add_gathered<TileT, T>(sums, p, m0, c0);
        if (p.side_columns > 0) add_side<TileT>(sums, p, m0, c0);
        if (p.bias != nullptr)
            for_each_sum<TileT>([&](int i, int q, int r, int, int column) {
                sums.at[i][q][r] += c0 + column < p.columns ? p.bias[c0 + column] : 0.0f;
            });
    }
    if (p.partial != nullptr) {
        const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
        const int64_t row = m0 + lane / 4, column = c0 + warp * TileT::kWarpColumns + lane % 4 * 2;
        float* out = p.partial + (part * p.M + row) * p.columns + column;
#pragma unroll
        for (int i = 0; i < TileT::kRowTiles * 2; ++i, out += 8 * p.columns) {
            if (row + i * 8 >= p.M) break;
#pragma unroll
            for (int q = 0; q < TileT::kColumnTiles; ++q) {
                const float* pair = sums.at[i / 2][q] + i % 2 * 2;
                if (p.columns % 2 == 0) {
                    if (column + q * 8 < p.columns) store(out + q * 8, Vector<float, 2>{pair[0], pair[1]});
                } else {
                    if (column + q * 8 < p.columns) out[q * 8] = pair[0];
                    if (column + q * 8 + 1 < p.columns) out[q * 8 + 1] = pair[1];
                }
            }
        }
        return;
    }
    uint8_t* tile = dynamic_shared<uint8_t>();
    __syncthreads();
    for_each_sum<TileT>([&](int i, int q, int r, int row, int column) {
        if (r % 2 == 0)
            store(tile + (row * TileT::kOutPitch + column) * 2, pair_of<T>(sums.at[i][q][r], sums.at[i][q][r + 1]));
    });
    __syncthreads();
    T* out = static_cast<T*>(p.out);
    constexpr int kRowUnits = TileT::kColumns / 8;
    for (int u = static_cast<int>(threadIdx.x); u < TileT::kRows * kRowUnits; u += TileT::kThreads) {
        const int row = u / kRowUnits, column = u % kRowUnits * 8;
        if (m0 + row >= p.M || c0 + column >= p.columns) continue;
        const auto numbers = load<Vector<T, 8>>(tile + (row * TileT::kOutPitch + column) * 2);
        T* to = out + (m0 + row) * p.columns + c0 + column;
        if (p.is_out_wide) {
            store(to, numbers);
        } else {
            for (int i = 0; i < 8; ++i)
                if (c0 + column + i < p.columns) to[i] = numbers.at[i];
        }
    }
}

}  // namespace prequant::cuda
