// The CUDA kernels' launchers, as the table of ../kernels.h calls them: one .cu each, named for its operator.
#pragma once

#include "../kernels.h"

namespace prequant::cuda {

void pack(const uint8_t* codes, int64_t N, int64_t K, int container, uint8_t* packed, Stream stream);
void unpack(const uint8_t* packed, int64_t N, int64_t K, int container, uint8_t* codes, Stream stream);
void dequantize(Weight weight, int64_t row_begin, MutableMatrix dense, Stream stream);

// What nvcc built: its version ("13.0") and the architectures ("8.0 9.0+PTX").
const char* toolkit_version();
const char* architectures();

}  // namespace prequant::cuda
