#include "launch.cuh"
#include "residual_block.h"

namespace sst {

namespace {

using namespace cuda;

template <class T>
__global__ void __launch_bounds__(ResidualBlock::kThreads)
    residual_kernel(const __grid_constant__ Residual<T> args, int64_t first) {
  __shared__ alignas(16) char shared[ResidualBlock::kSharedBytes];
  Block block{shared};
  residual_row(block, args, first + blockIdx.x);
}

}  // namespace

template <class T>
void residual_cuda(const Residual<T>& args, void* stream) {
  for_each_grid("_residual", args.batch * args.rows, [&](int64_t first, unsigned blocks) {
    residual_kernel<<<blocks, ResidualBlock::kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args, first);
  });
}

template void residual_cuda(const Residual<float>&, void*);
template void residual_cuda(const Residual<double>&, void*);

}  // namespace sst
