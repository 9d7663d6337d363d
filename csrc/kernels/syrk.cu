#include "syrk.h"
#include "tile.cuh"

namespace sst {

namespace {

template <class T>
__global__ void __launch_bounds__(kThreads) syrk_accumulate_kernel(Syrk<T> args) {
  using A = Accumulator<T>;
  const int64_t d = args.x.cols, tiles = triangle_count(ceil_div(d, kTile));
  for (int64_t unit = blockIdx.x; unit < args.batch * tiles; unit += gridDim.x) {
    const int64_t member = unit / tiles;
    const BlockIndex tile = triangle_block(unit % tiles);
    Rows<T> x = args.x;
    x.data += member * args.x_batch_stride;
    const A* weight = args.weight ? args.weight + member * args.weight_batch_stride : nullptr;
    TilePart<A> part;
    accumulate_tile(x.columns(tile.row * kTile, kTile), x.columns(tile.col * kTile, kTile), weight,
                    {0, args.tokens}, part);
#pragma unroll
    for (int r = 0; r < kPer; ++r) {
#pragma unroll
      for (int c = 0; c < kPer; ++c) {
        const int64_t i = tile.row * kTile + part.row + r * kSide;
        const int64_t j = tile.col * kTile + part.col + c * kSide;
        if (i < d && j <= i) {
          A* const s = args.s + member * args.s_batch_stride + i * args.s_row_stride + j;
          const A kept = args.beta == A(0) ? A(0) : args.beta * *s;
          *s = kept + args.alpha * part.sum[r][c];
        }
      }
    }
  }
}

}  // namespace

template <class T>
void syrk_accumulate_cuda(const Syrk<T>& args, void* stream) {
  const int64_t units = args.batch * triangle_count(ceil_div(args.x.cols, kTile));
  if (units == 0) return;
  syrk_accumulate_kernel<<<grid_size(units), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      args);
  check_launch("syrk_accumulate_");
}

template void syrk_accumulate_cuda(const Syrk<Half>&, void*);
template void syrk_accumulate_cuda(const Syrk<BFloat16>&, void*);
template void syrk_accumulate_cuda(const Syrk<float>&, void*);
template void syrk_accumulate_cuda(const Syrk<double>&, void*);

}  // namespace sst
