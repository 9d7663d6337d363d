#include "khatri_rao.h"

#include <algorithm>

#include "tile.h"

namespace sst {

template <class T>
void khatri_rao_rows_cpu(const KhatriRao<T>& args, std::atomic<int64_t>& next) {
  using A = Accumulator<T>;
  const TileScratch<A> scratch;
  const int64_t rows = args.b.cols, cols = args.a.cols;
  for (int64_t s = next++; s < args.sequences; s = next++) {
    const Range tokens = sequence_range(args.offsets, s, args.tokens);
    for (int64_t i = 0; i < rows; i += kTileSide) {
      for (int64_t j = 0; j < cols; j += kTileSide) {
        const TileOperands<T> x{args.b.columns(i, kTileSide), args.a.columns(j, kTileSide), args.weight, tokens, false};
        const int64_t stride = accumulate_tile(x, scratch);
        A* const out = args.out + (s * rows + i) * cols + j;
        for (int64_t r = 0; r < x.p.cols; ++r) std::copy_n(scratch.c + r * stride, x.q.cols, out + r * cols);
      }
    }
  }
}

template void khatri_rao_rows_cpu(const KhatriRao<Half>&, std::atomic<int64_t>&);
template void khatri_rao_rows_cpu(const KhatriRao<BFloat16>&, std::atomic<int64_t>&);
template void khatri_rao_rows_cpu(const KhatriRao<float>&, std::atomic<int64_t>&);
template void khatri_rao_rows_cpu(const KhatriRao<double>&, std::atomic<int64_t>&);

}  // namespace sst
