#include "launch.cuh"
#include "symm_thin_block.h"

namespace sst {

namespace {

using namespace cuda;

template <bool whole, class T>
__global__ void __launch_bounds__(SymmThinGrid<T>::kThreads, SymmThinGrid<T>::kResident)
    symm_thin_unit_kernel(const __grid_constant__ SymmThin<T> product, const __grid_constant__ SymmThinGrid<T> grid,
                          T* workspace, int k, int64_t first) {
  __shared__ alignas(16) char shared[SymmThinGrid<T>::kSharedBytes];
  Block block{shared};
  symm_thin_unit<whole>(block, product, grid, workspace, k, first + blockIdx.x);
}

template <class T>
__global__ void __launch_bounds__(SymmThinSums<T>::kThreads)
    symm_thin_sum_kernel(const __grid_constant__ SymmThin<T> product, const __grid_constant__ SymmThinGrid<T> grid,
                         const T* workspace, int64_t first) {
  Block block{nullptr};
  symm_thin_sum(block, product, grid, workspace, first + blockIdx.x);
}

}  // namespace

template <class T>
int64_t symm_thin_workspace_cuda(const SymmThin<T>& product) {
  const SymmThinGrid<T> grid(product);
  return product.matrices * product.members * grid.units_each() * grid.partial();
}

template <class T>
void symm_thin_cuda(const SymmThin<T>& product, T* workspace, void* stream) {
  const SymmThinGrid<T> grid(product);
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  for (int k = 0; k < product.matrices; ++k) {
    const auto kernel = holds_vectors(product, k) ? symm_thin_unit_kernel<true, T> : symm_thin_unit_kernel<false, T>;
    for_each_grid("symm_thin", product.members * grid.units_each(), [&](int64_t first, unsigned blocks) {
      kernel<<<blocks, SymmThinGrid<T>::kThreads, 0, cuda_stream>>>(product, grid, workspace, k, first);
    });
  }
  const int64_t sums = product.matrices * product.members * SymmThinSums<T>::blocks_each(grid);
  for_each_grid("symm_thin", sums, [&](int64_t first, unsigned blocks) {
    symm_thin_sum_kernel<<<blocks, SymmThinSums<T>::kThreads, 0, cuda_stream>>>(product, grid, workspace, first);
  });
}

#define SST_INSTANTIATE(T)                                       \
  template int64_t symm_thin_workspace_cuda(const SymmThin<T>&); \
  template void symm_thin_cuda(const SymmThin<T>&, T*, void*);
SST_INSTANTIATE(float)
SST_INSTANTIATE(double)

}  // namespace sst
