#include "khatri_rao.h"
#include "tile.cuh"

namespace sst {

namespace {

template <class T>
__global__ void __launch_bounds__(kThreads) khatri_rao_rows_kernel(KhatriRao<T> args) {
  using A = Accumulator<T>;
  const int64_t rows = args.b.cols, cols = args.a.cols;
  const int64_t tile_cols = ceil_div(cols, kTile), tiles = ceil_div(rows, kTile) * tile_cols;
  for (int64_t unit = blockIdx.x; unit < args.sequences * tiles; unit += gridDim.x) {
    const int64_t s = unit / tiles, tile = unit % tiles;
    const int64_t row0 = tile / tile_cols * kTile, col0 = tile % tile_cols * kTile;
    TilePart<A> part;
    accumulate_tile(args.b.columns(row0, kTile), args.a.columns(col0, kTile), args.weight,
                    sequence_range(args.offsets, s, args.tokens), part);
#pragma unroll
    for (int r = 0; r < kPer; ++r) {
#pragma unroll
      for (int c = 0; c < kPer; ++c) {
        const int64_t i = row0 + part.row + r * kSide, j = col0 + part.col + c * kSide;
        if (i < rows && j < cols) args.out[(s * rows + i) * cols + j] = part.sum[r][c];
      }
    }
  }
}

}  // namespace

template <class T>
void khatri_rao_rows_cuda(const KhatriRao<T>& args, void* stream) {
  const int64_t units =
      args.sequences * ceil_div(args.b.cols, kTile) * ceil_div(args.a.cols, kTile);
  if (units == 0) return;
  khatri_rao_rows_kernel<<<grid_size(units), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      args);
  check_launch("khatri_rao_rows");
}

template void khatri_rao_rows_cuda(const KhatriRao<Half>&, void*);
template void khatri_rao_rows_cuda(const KhatriRao<BFloat16>&, void*);
template void khatri_rao_rows_cuda(const KhatriRao<float>&, void*);
template void khatri_rao_rows_cuda(const KhatriRao<double>&, void*);

}  // namespace sst
