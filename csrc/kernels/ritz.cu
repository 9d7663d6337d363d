#include "launch.cuh"
#include "ritz_block.h"

namespace sst {

namespace {

using namespace cuda;

__global__ void __launch_bounds__(kRitzThreads) ritz_matrix_kernel(const RitzMatrix args, int64_t first) {
  Block block{nullptr};
  ritz_matrix<kRitzThreads>(block, args, first + blockIdx.x);
}
__global__ void __launch_bounds__(kRitzThreads) orthonormalizer_kernel(const Orthonormalizer args, int64_t first) {
  Block block{nullptr};
  orthonormalizer<kRitzThreads>(block, args, first + blockIdx.x);
}
__global__ void __launch_bounds__(kRitzThreads) judge_kernel(const Judge args, int64_t first) {
  Block block{nullptr};
  judge<kRitzThreads>(block, args, first + blockIdx.x);
}

template <class Args>
void launch(void (*kernel)(Args, int64_t), const Args& args, void* stream) {
  for_each_grid("solve", args.batch, [&](int64_t first, unsigned blocks) {
    kernel<<<blocks, kRitzThreads, 0, static_cast<cudaStream_t>(stream)>>>(args, first);
  });
}

}  // namespace

void ritz_matrix_cuda(const RitzMatrix& args, void* stream) { launch(ritz_matrix_kernel, args, stream); }
void orthonormalizer_cuda(const Orthonormalizer& args, void* stream) { launch(orthonormalizer_kernel, args, stream); }
void judge_cuda(const Judge& args, void* stream) { launch(judge_kernel, args, stream); }

}  // namespace sst
