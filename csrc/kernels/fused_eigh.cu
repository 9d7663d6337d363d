#include "fused_eigh_block.h"
#include "launch.cuh"

namespace sst {

namespace {

using namespace cuda;

constexpr const char* kOp = "fused_eigh";

template <class T, int Threads>
__global__ void __launch_bounds__(Threads) fused_eigh_kernel(const __grid_constant__ FusedEigh<T> args, int64_t first) {
  extern __shared__ __align__(16) char shared[];
  Block block{shared};
  FusedBlock<T, Threads>{args, first + blockIdx.x, {static_cast<int>(args.n)}}.run(block);
}

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(kOp) + ": CUDA: " + cudaGetErrorString(error));
}

template <class T, int Threads>
void launch(const FusedEigh<T>& args, cudaStream_t stream) {
  const int bytes = FusedLayout<T>{static_cast<int>(args.n)}.bytes();
  check(cudaFuncSetAttribute(fused_eigh_kernel<T, Threads>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  for_each_grid(kOp, args.batch, [&](int64_t first, unsigned blocks) {
    fused_eigh_kernel<T, Threads><<<blocks, Threads, bytes, stream>>>(args, first);
  });
}

}  // namespace

template <class T>
int64_t fused_eigh_cuda_limit() {
  int device = 0, bytes = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return fused_layout_limit<T>(bytes);
}

// A multiprocessor holds several small pencils at once, of which each is then given fewer threads.
template <class T>
void fused_eigh_cuda(const FusedEigh<T>& args, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (args.n <= 32) return launch<T, 128>(args, cuda_stream);
  if (args.n <= 64) return launch<T, 256>(args, cuda_stream);
  launch<T, 512>(args, cuda_stream);
}

#define SST_INSTANTIATE(T)                     \
  template int64_t fused_eigh_cuda_limit<T>(); \
  template void fused_eigh_cuda(const FusedEigh<T>&, void*);
SST_INSTANTIATE(float)
SST_INSTANTIATE(double)

}  // namespace sst
