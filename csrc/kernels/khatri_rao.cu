#include "khatri_rao_block.h"
#include "launch.cuh"

namespace sst {

namespace {

using namespace cuda;

template <class Engine>
__global__ void __launch_bounds__(Engine::kThreads, Engine::kResident)
    khatri_rao_kernel(const __grid_constant__ KhatriRao<typename Engine::T> args, int64_t first) {
  __shared__ alignas(16) char shared[kSharedBytes<Engine>];
  Block block{shared};
  khatri_rao_unit<Engine>(block, args, first + blockIdx.x);
}

template <class Engine>
void run(const KhatriRao<typename Engine::T>& args, cudaStream_t stream) {
  const int64_t units = args.sequences * khatri_rao_tiles<Engine>(args);
  for_each_grid("khatri_rao_rows", units, [&](int64_t first, unsigned blocks) {
    khatri_rao_kernel<Engine><<<blocks, Engine::kThreads, 0, stream>>>(args, first);
  });
}

}  // namespace

template <class T>
void khatri_rao_rows_cuda(const KhatriRao<T>& args, void* stream) {
  visit_khatri_rao_engine(
      args, [&](auto engine) { run<typename decltype(engine)::type>(args, static_cast<cudaStream_t>(stream)); });
}

template void khatri_rao_rows_cuda(const KhatriRao<Half>&, void*);
template void khatri_rao_rows_cuda(const KhatriRao<BFloat16>&, void*);
template void khatri_rao_rows_cuda(const KhatriRao<float>&, void*);
template void khatri_rao_rows_cuda(const KhatriRao<double>&, void*);

}  // namespace sst
