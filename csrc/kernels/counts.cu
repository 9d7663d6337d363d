#include "counts_block.h"
#include "launch.cuh"

namespace sst {

namespace {

using namespace cuda;

template <class A>
__global__ void __launch_bounds__(CountsBlock::kThreads) add_counts_kernel(const __grid_constant__ Counts<A> args) {
  __shared__ alignas(16) char shared[CountsBlock::kSharedBytes];
  Block block{shared};
  add_counts(block, args);
}

}  // namespace

template <class A>
void add_counts_cuda(const Counts<A>& args, void* stream) {
  for_each_grid("kron_accumulate_", 1, [&](int64_t, unsigned blocks) {
    add_counts_kernel<<<blocks, CountsBlock::kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
  });
}

template void add_counts_cuda(const Counts<float>&, void*);
template void add_counts_cuda(const Counts<double>&, void*);

}  // namespace sst
