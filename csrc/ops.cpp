// Every operator of torch.ops.prequant: its schema, and its registration. START HERE.
//
// An operator is one host function (ops_storage.cpp, ops_quantize.cpp, ops_linear.cpp) that checks its arguments,
// allocates and calls the kernel of the tensors' device through the table in kernels.h. What it computes:
// prequant_ext/reference.py, same name. Fakes and gradients are registered in prequant_ext/ops/.
//
//   M tokens   K in_features   N out_features   G scales along K   r outlier dimensions   B bytes of a packed row
//   weight (N, K) float    weight_packed (N, B) uint8    scale float32, zero_point uint8: (1, 1), (N, 1) or (N, G)
//   axis 1: outlier_dims are columns, outlier_weight (N, r);  axis 0: rows, (r, K)
//   linear_*: weight_packed is canonical, or what prepack made of it (3 dimensions), which costs no conversion in the
//   call; then out_features says N
//   in_float32: float32 inputs are multiplied as they are; False lets a kernel round them to int16 blocks, as it may
//   with half-width inputs always
#include "ops.h"

#include <Python.h>
#include <dlfcn.h>
#include <torch/csrc/stable/library.h>

#ifndef PREQUANT_LIBRARY  // the tests' emulated libraries have names of their own
#define PREQUANT_LIBRARY prequant
#endif

STABLE_TORCH_LIBRARY(PREQUANT_LIBRARY, m) {
    // statistics: four float64 tensors in the shape of the scales;  column_counts, column_energy (K),
    // row_counts, row_energy (N);  (r) ascending
    m.def("weight_stats(Tensor weight, int block_size) -> (Tensor, Tensor, Tensor, Tensor)");
    m.def(
        "outlier_counts(Tensor weight, Tensor mean, Tensor std, float threshold) -> (Tensor, Tensor, Tensor, Tensor)");
    m.def("select_outlier_dims(Tensor counts, Tensor energy, int r) -> Tensor");

    // codes and storage
    m.def(
        "quantize_pack(Tensor weight, Tensor scale, Tensor zero_point, int bits, Tensor outlier_dims, int axis) -> "
        "Tensor");
    m.def("pack(Tensor codes, int bits) -> Tensor");
    m.def("unpack(Tensor weight_packed, int K, int bits) -> Tensor");
    m.def("prepack(Tensor weight_packed, int K, int bits) -> Tensor");
    m.def("unprepack(Tensor prepacked, int N, int K, int bits) -> Tensor");
    m.def(
        "dequantize(Tensor weight_packed, Tensor scale, Tensor zero_point, int K, int bits, ScalarType dtype, int "
        "row_begin=0, int? row_end=None) -> Tensor");
    m.def(
        "scatter_outlier_(Tensor(a!) dense, Tensor outlier_dims, Tensor outlier_weight, int axis, bool accumulate) -> "
        "()");

    // activations and embeddings: codes (M, K) uint8, scale and zero_point (M, 1) or (1, 1), sums (M, G) int32
    m.def(
        "quantize_activations(Tensor x, bool per_token, int group_size, Tensor? excluded_dims=None) -> (Tensor, "
        "Tensor, Tensor, Tensor)");
    m.def("embedding(Tensor ids, Tensor codes, Tensor scale, Tensor zero_point, ScalarType dtype) -> Tensor");

    // the linear layer: x (M, K) -> y (M, N); grad_y (M, N) -> grad_x (M, K); gradients of outlier_weight and of scale
    m.def(
        "linear_w4a16(Tensor x, Tensor weight_packed, Tensor scale, Tensor zero_point, Tensor outlier_dims, Tensor "
        "outlier_weight, Tensor? bias, int bits, "
        "int axis, int? out_features=None, bool in_float32=True) -> Tensor");
    m.def(
        "linear_w4a8(Tensor x, Tensor? x_codes, Tensor? x_scale, Tensor? x_zero_point, Tensor? x_sums, Tensor "
        "weight_packed, Tensor scale, Tensor zero_point, "
        "Tensor outlier_dims, Tensor outlier_weight, Tensor? bias, int bits, int axis, bool raw_outliers, int? "
        "out_features=None, bool per_token=True) -> "
        "Tensor");
    m.def(
        "linear_dx(Tensor grad_y, Tensor weight_packed, Tensor scale, Tensor zero_point, Tensor outlier_dims, Tensor "
        "outlier_weight, int K, int bits, "
        "int axis, bool in_float32=True) -> Tensor");
    m.def(
        "outlier_grad(Tensor grad_y, Tensor x, Tensor? x_scale, Tensor? x_zero_point, Tensor outlier_dims, int axis) "
        "-> Tensor");
    m.def(
        "scale_grad(Tensor grad_y, Tensor x, Tensor? x_scale, Tensor? x_zero_point, Tensor weight_packed, Tensor "
        "zero_point, int bits) -> Tensor");

    // what was built and what is in use: "isa=...;cuda=...;arch=..."
    m.def("build_info() -> str");
}

namespace prequant {

std::string build_info();  // build_info.cpp

// The same host functions serve every device: a tensor on a GPU that this build has no kernel for must meet our error,
// not the dispatcher's.
static void register_on(torch::stable::detail::StableLibrary& m) {
    m.impl("weight_stats", TORCH_BOX(&weight_stats));
    m.impl("outlier_counts", TORCH_BOX(&outlier_counts));
    m.impl("select_outlier_dims", TORCH_BOX(&select_outlier_dims));
    m.impl("quantize_pack", TORCH_BOX(&quantize_pack));
    m.impl("pack", TORCH_BOX(&pack));
    m.impl("unpack", TORCH_BOX(&unpack));
    m.impl("prepack", TORCH_BOX(&prepack));
    m.impl("unprepack", TORCH_BOX(&unprepack));
    m.impl("dequantize", TORCH_BOX(&dequantize));
    m.impl("scatter_outlier_", TORCH_BOX(&scatter_outlier_));
    m.impl("quantize_activations", TORCH_BOX(&quantize_activations));
    m.impl("embedding", TORCH_BOX(&embedding));
    m.impl("linear_w4a16", TORCH_BOX(&linear_w4a16));
    m.impl("linear_w4a8", TORCH_BOX(&linear_w4a8));
    m.impl("linear_dx", TORCH_BOX(&linear_dx));
    m.impl("outlier_grad", TORCH_BOX(&outlier_grad));
    m.impl("scale_grad", TORCH_BOX(&scale_grad));
}

}  // namespace prequant

STABLE_TORCH_LIBRARY_IMPL(PREQUANT_LIBRARY, CPU, m) { prequant::register_on(m); }
STABLE_TORCH_LIBRARY_IMPL(PREQUANT_LIBRARY, CUDA, m) { prequant::register_on(m); }
STABLE_TORCH_LIBRARY_IMPL(PREQUANT_LIBRARY, CompositeExplicitAutograd, m) {
    m.impl("build_info", TORCH_BOX(&prequant::build_info));
}

#ifndef PREQUANT_EMULATED
// `import prequant_ext._C` loads this library; the operators live in torch.ops.
static PyModuleDef kModule = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() { return PyModule_Create(&kModule); }
#endif
