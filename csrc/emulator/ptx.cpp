// What the PTX instructions of ../cuda/ptx.cuh do. Operand layouts: PTX ISA, "Matrix fragments for mma".
//
// In every fragment lane = 4 g + q. A thread holds rows g and g + 8 of A and D, column g of B; within a row its
// elements are q's share.
#include "internal.h"

namespace prequant::emulator {

// ---- cp.async ----

static void land(AsyncCopy& copy) {
    if (copy.has_landed) return;
    copy.has_landed = true;
    unsigned char* to = current->block->shared + copy.to;
    if (copy.bytes > 0) std::memcpy(to, copy.from, static_cast<size_t>(copy.bytes));
    if (copy.bytes < 16) std::memset(to + copy.bytes, 0, static_cast<size_t>(16 - copy.bytes));
}

void cp_async_16(void* shared_to, const void* from, int source_bytes) {
    const uint32_t to = shared_offset(shared_to);
    check_shared(to, 16, "cp.async");
    if (source_bytes < 0 || source_bytes > 16) fail("cp.async: %d source bytes, there are 0 to 16", source_bytes);
    if (reinterpret_cast<uintptr_t>(from) % 16 != 0) fail("cp.async: source %p is not a multiple of 16", from);
    if (hooks != nullptr) {
        const void* where = __builtin_return_address(0);
        if (source_bytes > 0) hooks->access(where, from, source_bytes, Access::load);
        hooks->copy_issued(where, to, 16);
    }
    AsyncCopy copy{to, from, source_bytes, current->fiber->open_group, false};
    if (options.cp_async == CpAsync::eager ||
        (options.cp_async == CpAsync::random && (next_random(current->block) & 1)))
        land(copy);
    current->fiber->copies.push_back(copy);
}

void cp_async_commit() { ++current->fiber->open_group; }

void cp_async_wait(int newest_groups_left) {
    std::vector<AsyncCopy>& copies = current->fiber->copies;
    const int done = current->fiber->open_group - newest_groups_left;
    size_t kept = 0;
    for (AsyncCopy& copy : copies) {
        if (copy.group < done) {
            land(copy);
            if (hooks != nullptr) hooks->copy_landed(copy.to, 16);
        } else {
            copies[kept++] = copy;
        }
    }
    copies.resize(kept);
}

// ---- matrices in shared memory ----

namespace {

struct Loaded {
    uint32_t row;
    uint32_t* registers;
    int matrices;
    bool is_transposed;
    const void* where;
};

// One 8 x 8 matrix of 16-bit elements, as the fragment of each lane: elements (g, 2q) and (g, 2q + 1).
uint32_t fragment(const uint16_t (&matrix)[8][8], int lane, bool is_transposed) {
    const int g = lane >> 2, column = (lane & 3) * 2;
    const uint32_t low = is_transposed ? matrix[column][g] : matrix[g][column];
    const uint32_t high = is_transposed ? matrix[column + 1][g] : matrix[g][column + 1];
    return low | high << 16;
}

}  // namespace

void ldmatrix(uint32_t* registers, int matrices, bool is_transposed, const void* row) {
    const bool gives_row = static_cast<int>(current->lane) < 8 * matrices;  // the other lanes' addresses are not read
    const uint32_t offset = gives_row ? shared_offset(row) : 0;
    check_shared(offset, 16, "ldmatrix");
    Loaded mine{offset, registers, matrices, is_transposed, __builtin_return_address(0)};
    const char* name = matrices == 4   ? is_transposed ? "ldmatrix.x4.trans" : "ldmatrix.x4"
                       : is_transposed ? "ldmatrix.x2.trans"
                                       : "ldmatrix.x2";
    collective(name, kWholeWarp, &mine, [](void** arguments, uint32_t) {
        const auto* first = static_cast<Loaded*>(arguments[0]);
        uint32_t rows[32];
        for (int lane = 0; lane < kWarp; ++lane) rows[lane] = static_cast<Loaded*>(arguments[lane])->row;
        if (hooks != nullptr) hooks->ldmatrix(first->where, rows, 8 * first->matrices);
        for (int m = 0; m < first->matrices; ++m) {
            uint16_t matrix[8][8];
            for (int i = 0; i < 8; ++i) std::memcpy(matrix[i], current->block->shared + rows[m * 8 + i], 16);
            for (int lane = 0; lane < kWarp; ++lane)
                static_cast<Loaded*>(arguments[lane])->registers[m] = fragment(matrix, lane, first->is_transposed);
        }
    });
}

uint32_t movmatrix_trans(uint32_t value) {
    collective("movmatrix.trans", kWholeWarp, &value, [](void** arguments, uint32_t) {
        uint16_t matrix[8][8];
        for (int lane = 0; lane < kWarp; ++lane) std::memcpy(&matrix[lane >> 2][(lane & 3) * 2], arguments[lane], 4);
        for (int lane = 0; lane < kWarp; ++lane)
            *static_cast<uint32_t*>(arguments[lane]) = fragment(matrix, lane, true);
    });
    return value;
}

// ---- mma ----

namespace {

struct Product {
    void* d;
    const uint32_t *a, *b;
};

template <Operand kOperand>
float value_of(uint32_t bits) {
    if constexpr (kOperand == Operand::half) {
        __half_raw half;
        half.x = static_cast<unsigned short>(bits);
        return __half2float(half);
    } else {
        bits <<= 16;
        float value;
        std::memcpy(&value, &bits, 4);
        return value;
    }
}

// A register holds two elements of a row of A (of a column of B): A in registers (rows g, g + 8) x (k 2q, k 2q + 8), B
// in (k 2q, k 2q + 8).
template <Operand kOperand, int kDepth>
void multiply_float(void** arguments, uint32_t) {
    alignas(64) float a[16][kDepth], b[kDepth][8], d[16][8];
    for (int lane = 0; lane < kWarp; ++lane) {
        const auto* mine = static_cast<Product*>(arguments[lane]);
        const int g = lane >> 2, q = lane & 3;
        for (int r = 0; r < kDepth / 4; ++r)
            for (int i = 0; i < 2; ++i)
                a[g + r % 2 * 8][r / 2 * 8 + q * 2 + i] = value_of<kOperand>(mine->a[r] >> (16 * i) & 0xffff);
        for (int r = 0; r < kDepth / 8; ++r)
            for (int i = 0; i < 2; ++i) b[r * 8 + q * 2 + i][g] = value_of<kOperand>(mine->b[r] >> (16 * i) & 0xffff);
        for (int r = 0; r < 4; ++r) d[g + r / 2 * 8][q * 2 + r % 2] = static_cast<float*>(mine->d)[r];
    }
    for (int m = 0; m < 16; ++m)
        for (int k = 0; k < kDepth; ++k)
            for (int n = 0; n < 8; ++n) d[m][n] += a[m][k] * b[k][n];
    for (int lane = 0; lane < kWarp; ++lane) {
        const int g = lane >> 2, q = lane & 3;
        for (int r = 0; r < 4; ++r)
            static_cast<float*>(static_cast<Product*>(arguments[lane])->d)[r] = d[g + r / 2 * 8][q * 2 + r % 2];
    }
}

// Four elements a register: A in registers (rows g, g + 8) x (k 4q, k 4q + 16), B in (k 4q, k 4q + 16).
template <bool kAIsSigned, int kRows, int kDepth>
void multiply_int8(void** arguments, uint32_t) {
    int a[kRows][kDepth], b[kDepth][8];
    uint32_t d[kRows][8];
    const auto element = [](uint32_t word, int i, bool is_signed) {
        return is_signed ? int(int8_t(word >> (8 * i))) : int(uint8_t(word >> (8 * i)));
    };
    constexpr int kRowHalves = kRows / 8;
    for (int lane = 0; lane < kWarp; ++lane) {
        const auto* mine = static_cast<Product*>(arguments[lane]);
        const int g = lane >> 2, q = lane & 3;
        for (int r = 0; r < kRowHalves * kDepth / 16; ++r)
            for (int i = 0; i < 4; ++i)
                a[g + r % kRowHalves * 8][r / kRowHalves * 16 + q * 4 + i] = element(mine->a[r], i, kAIsSigned);
        for (int r = 0; r < kDepth / 16; ++r)
            for (int i = 0; i < 4; ++i) b[r * 16 + q * 4 + i][g] = element(mine->b[r], i, !kAIsSigned);
        for (int r = 0; r < kRowHalves * 2; ++r) d[g + r / 2 * 8][q * 2 + r % 2] = static_cast<uint32_t*>(mine->d)[r];
    }
    for (int m = 0; m < kRows; ++m)
        for (int k = 0; k < kDepth; ++k)
            for (int n = 0; n < 8; ++n) d[m][n] += static_cast<uint32_t>(a[m][k] * b[k][n]);
    for (int lane = 0; lane < kWarp; ++lane) {
        const int g = lane >> 2, q = lane & 3;
        for (int r = 0; r < kRowHalves * 2; ++r)
            static_cast<uint32_t*>(static_cast<Product*>(arguments[lane])->d)[r] = d[g + r / 2 * 8][q * 2 + r % 2];
    }
}

}  // namespace

void mma_float(Operand operand, int k, float* d, const uint32_t* a, const uint32_t* b) {
    Product mine{d, a, b};
    if (operand == Operand::half && k == 16)
        return collective("mma.m16n8k16.f16", kWholeWarp, &mine, &multiply_float<Operand::half, 16>);
    if (operand == Operand::half && k == 8)
        return collective("mma.m16n8k8.f16", kWholeWarp, &mine, &multiply_float<Operand::half, 8>);
    if (operand == Operand::bfloat16 && k == 16)
        return collective("mma.m16n8k16.bf16", kWholeWarp, &mine, &multiply_float<Operand::bfloat16, 16>);
    fail("no mma of depth %d for this operand", k);
}

void mma_int8_m16n8k32(bool a_is_signed, int32_t* d, const uint32_t* a, const uint32_t* b) {
    Product mine{d, a, b};
    if (a_is_signed) return collective("mma.m16n8k32.s8.u8", kWholeWarp, &mine, &multiply_int8<true, 16, 32>);
    collective("mma.m16n8k32.u8.s8", kWholeWarp, &mine, &multiply_int8<false, 16, 32>);
}

void mma_int8_m8n8k16(bool a_is_signed, int32_t* d, const uint32_t* a, const uint32_t* b) {
    Product mine{d, a, b};
    if (a_is_signed) return collective("mma.m8n8k16.s8.u8", kWholeWarp, &mine, &multiply_int8<true, 8, 16>);
    collective("mma.m8n8k16.u8.s8", kWholeWarp, &mine, &multiply_int8<false, 8, 16>);
}

}  // namespace prequant::emulator
