// rows[i] = (codes[ids[i]] - zero_point[b]) * scale[b] in float32, then cast; b = ids[i] per row, 0 per table.
//                                                                                          Meaning: reference.embedding
//   row i, fp16 out     codes     0 ... 7 | 8 ... 15 | ...      A thread makes one 128-bit store (8 halves or 4 floats)
//                       thread       0    |    1     | ...      from one load of 8 or 4 codes.
//
// Requires   128-bit stores need the table's width to be a multiple of their values, and aligned pointers; otherwise a
//            thread makes one value. The host does not read ids back from a GPU: an id that is out of range makes a row
//            of NaN.
// Rounds     once, from float32.
// Limited by writing the rows; the codes are half of their bytes or a quarter.
#include "cuda.h"
#include "portable.cuh"

namespace prequant::cuda {

namespace {

template <typename T, int kCodes>
__global__ void embedding_kernel(const int64_t* __restrict__ ids, const uint8_t* __restrict__ codes,
                                 const float* __restrict__ scale, const uint8_t* __restrict__ zero_point,
                                 int64_t table_rows, bool per_row, int64_t count, int64_t row_vectors,
                                 T* __restrict__ rows) {
    using Codes = Vector<uint8_t, kCodes>;
    using Values = Vector<T, kCodes>;
    const int64_t i = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
    if (i >= count) return;
    const int64_t id = ids[i], block = per_row ? id : 0;
    const bool is_known = 0 <= id && id < table_rows;
    const float step = is_known ? scale[block] : __uint_as_float(kNanBits);
    const int zero = is_known ? zero_point[block] : 0;
    const Codes* from = reinterpret_cast<const Codes*>(codes) + (is_known ? id : 0) * row_vectors;
    Values* to = reinterpret_cast<Values*>(rows) + i * row_vectors;
    for (int64_t vector = int64_t(blockIdx.y) * blockDim.x + threadIdx.x; vector < row_vectors;
         vector += int64_t(gridDim.y) * blockDim.x) {
        const Codes in = is_known ? load<Codes>(from + vector) : Codes{};
        Values out;
#pragma unroll
        for (int j = 0; j < kCodes; ++j) out.at[j] = from_float<T>(static_cast<float>(in.at[j] - zero) * step);
        store(to + vector, out);
    }
}

template <typename T>
void embedding_to(const int64_t* ids, const uint8_t* codes, const float* scale, const uint8_t* zero_point,
                  int64_t table_rows, bool per_row, MutableMatrix rows, Stream stream) {
    constexpr int kCodes = kVectorBytes / sizeof(T);
    T* to = static_cast<T*>(rows.data);
    const bool is_wide = rows.cols % kCodes == 0 && is_aligned(to, kVectorBytes) && is_aligned(codes, kCodes);
    const int64_t vectors = is_wide ? rows.cols / kCodes : rows.cols;
    launch("embedding_kernel", is_wide ? embedding_kernel<T, kCodes> : embedding_kernel<T, 1>,
           row_grid(rows.rows, vectors, stream), ids, codes, scale, zero_point, table_rows, per_row, rows.rows, vectors,
           to);
}

}  // namespace

void embedding(const int64_t* ids, const uint8_t* codes, const float* scale, const uint8_t* zero_point,
               int64_t table_rows, bool per_row, MutableMatrix rows, Stream stream) {
    if (rows.rows == 0 || rows.cols == 0) return;
    switch (rows.dtype) {
        case Dtype::float32:
            return embedding_to<float>(ids, codes, scale, zero_point, table_rows, per_row, rows, stream);
        case Dtype::float16:
            return embedding_to<__half>(ids, codes, scale, zero_point, table_rows, per_row, rows, stream);
        case Dtype::bfloat16:
            return embedding_to<__nv_bfloat16>(ids, codes, scale, zero_point, table_rows, per_row, rows, stream);
    }
}

}  // namespace prequant::cuda
