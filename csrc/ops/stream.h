// torch's current CUDA stream, from the one symbol of libtorch_cuda that the module uses.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <stdexcept>

// Weak: absent from a CPU-only torch, beside which a module built with CUDA must still load.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace sst {

inline void* current_stream(int32_t device) {
  if (!aoti_torch_get_current_cuda_stream) {
    throw std::runtime_error(
        "sst_kernels: a CUDA op was called, but the torch in use has no CUDA stream to give; "
        "install a CUDA build of torch");
  }
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}

}  // namespace sst
