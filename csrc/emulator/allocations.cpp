// Sees what operators allocate: this library is linked with --wrap=torch_call_dispatcher, through which they call
// aten::new_empty.
#include <torch/csrc/stable/c/shim.h>

#include <cstring>

#include "internal.h"

extern "C" {

AOTITorchError __real_torch_call_dispatcher(const char* op, const char* overload, StableIValue* stack,
                                            uint64_t version);

AOTITorchError __wrap_torch_call_dispatcher(const char* op, const char* overload, StableIValue* stack,
                                            uint64_t version) {
    const AOTITorchError error = __real_torch_call_dispatcher(op, overload, stack, version);
    const bool is_fresh = std::strcmp(op, "aten::new_empty") == 0;
    if (error != AOTI_TORCH_SUCCESS ||
        !(is_fresh || std::strcmp(op, "aten::contiguous") == 0 || std::strcmp(op, "aten::to") == 0))
        return error;
    AtenTensorHandle tensor;
    std::memcpy(&tensor, stack, sizeof tensor);
    void* address = nullptr;
    int64_t bytes = 0;
    if (aoti_torch_get_data_ptr(tensor, &address) == AOTI_TORCH_SUCCESS &&
        aoti_torch_get_storage_size(tensor, &bytes) == AOTI_TORCH_SUCCESS)
        prequant::emulator::buffer_allocated(address, static_cast<size_t>(bytes), is_fresh);
    return error;
}
}
