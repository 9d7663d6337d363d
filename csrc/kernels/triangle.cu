#include "launch.cuh"
#include "triangle_block.h"

namespace sst {

namespace {

using namespace cuda;

template <class A>
__global__ void __launch_bounds__(TriangleTile::kThreads)
    copy_triangle_kernel(const __grid_constant__ Triangle<A> args, TriangleCopy what, int64_t first) {
  __shared__ alignas(16) char shared[TriangleTile::kSharedBytes<A>];
  Block block{shared};
  copy_triangle_tile(block, args, what, first + blockIdx.x);
}

}  // namespace

template <class A>
void copy_triangle_cuda(const Triangle<A>& args, TriangleCopy what, void* stream) {
  const char* const op = what == TriangleCopy::symmetrize ? "symmetrize_"
                         : what == TriangleCopy::pack     ? "pack_lower"
                                                          : "unpack_lower";
  for_each_grid(op, args.batch * TriangleTile::tiles(args.d), [&](int64_t first, unsigned blocks) {
    copy_triangle_kernel<<<blocks, TriangleTile::kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args, what, first);
  });
}

template void copy_triangle_cuda(const Triangle<float>&, TriangleCopy, void*);
template void copy_triangle_cuda(const Triangle<double>&, TriangleCopy, void*);

}  // namespace sst
