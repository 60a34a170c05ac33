// Which table serves a tensor, with the tensor's GPU current and its stream at hand.
#include <dlfcn.h>

#include "ops.h"

namespace prequant {

#ifdef PREQUANT_EMULATED
const Kernels& emulated_kernels();  // cuda/*.cu run on the CPU by csrc/emulator
static const Kernels* host_table() { return &emulated_kernels(); }
#else
static const Kernels* host_table() { return &cpu_kernels(); }
#endif

#ifdef PREQUANT_CUDA
static const Kernels* cuda_table() { return &cuda_kernels(); }
#else
static const Kernels* cuda_table() { return nullptr; }
#endif

// The stable ABI knows the native stream from torch 2.13 on. Before, it is a C function of libtorch_cuda, which a CPU
// build of torch lacks: looked up at the first CUDA call, so that one library loads under both.
static void* current_cuda_stream(int32_t device) {
    using GetStream = int32_t (*)(int32_t, void**);
    static const GetStream get_stream = [] {
        void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
        return library ? reinterpret_cast<GetStream>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
    }();
    STD_TORCH_CHECK(
        get_stream != nullptr,
        "this torch cannot name its CUDA stream (aoti_torch_get_current_cuda_stream is not in libtorch_cuda.so)");
    void* stream = nullptr;
    STD_TORCH_CHECK(get_stream(device, &stream) == 0, "torch gave no current CUDA stream for cuda:", device);
    return stream;
}

bool has_chunks(const Tensor& tensor) {
#ifdef PREQUANT_EMULATED
    return tensor.is_cpu();
#else
    return tensor.is_cuda();
#endif
}

int64_t Device::prepacked_bytes(int64_t N, int64_t K, int container) const {
    const auto [size] = prepacked_shape(like_, N, K, container);
    return size[0] * size[1] * size[2];
}

void* Device::allocate(int64_t bytes) {
#ifndef PREQUANT_EMULATED
    // Kept by the thread: torch's allocator takes longer than a small layer.
    if (gpu_ < 0) return buffers_.emplace_back(std::make_unique<Buffer>(bytes))->data();
#endif
    constexpr int64_t kAlignment = 256;
    scratch_.push_back(empty_on(like_, {bytes + kAlignment}, ScalarType::Byte));  // torch aligns less on the CPU
    const uintptr_t address = reinterpret_cast<uintptr_t>(scratch_.back().mutable_data_ptr());
    return reinterpret_cast<void*>((address + kAlignment - 1) / kAlignment * kAlignment);
}

Device::Device(const Tensor& tensor) : like_(tensor), name_(device_name(tensor)) {
    if (tensor.is_cpu()) {
        kernels_ = host_table();
    } else if (tensor.is_cuda() && cuda_table() != nullptr) {
        kernels_ = cuda_table();
        gpu_ = tensor.get_device_index();
    }
}

void Device::activate() {
    if (gpu_ < 0 || guard_.has_value()) return;
    guard_.emplace(gpu_);
    stream_ = current_cuda_stream(gpu_);
}

void Device::missing(const char* op) const {
    STD_TORCH_CHECK(false, "prequant::", op, " has no kernel for ", name_, " in this build",
                    cuda_table() == nullptr ? " (built without CUDA). Rebuild where nvcc is found: PREQUANT_CUDA=1 pip "
                                              "install --no-build-isolation --force-reinstall ."
                                            : ". Move the tensors to the CPU, or rebuild from a version whose "
                                              "`prequant doctor` lists the operator for this device: "
                                              "PREQUANT_CUDA=1 pip install --no-build-isolation --force-reinstall .");
    __builtin_unreachable();
}

}  // namespace prequant
