// Launching kernels whose blocks of threads each take a unit of work.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "mma.cuh"

namespace sst::cuda {

// Calls launch(first, blocks) until `units` are covered by grids of blocks: one, but for more than a grid can have. A
// kernel without a loop over units leaves the compiler nothing to keep in registers from one to the next. Throws
// std::runtime_error, naming the op, if a launch fails.
template <class Launch>
void for_each_grid(const char* op, int64_t units, Launch launch) {
  constexpr int64_t kMost = 0x7fffffff;
  for (int64_t first = 0; first < units; first += kMost) {
    launch(first, static_cast<unsigned>(least(units - first, kMost)));
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) {
      throw std::runtime_error(std::string(op) + ": CUDA launch failed: " + cudaGetErrorString(error));
    }
  }
}

}  // namespace sst::cuda
