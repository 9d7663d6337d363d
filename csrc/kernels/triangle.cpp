#include "triangle.h"

#include <algorithm>

namespace sst {

namespace {

// The strict upper triangle's part in columns [first, last) ← the mirrored rows, a square block at a time so that both
// stay in the cache.
template <class A>
void mirror_rows(A* s, int64_t stride, int64_t first, int64_t last) {
  for (int64_t j0 = 0; j0 < last; j0 += kTriangleBand) {
    for (int64_t j = j0; j < std::min(j0 + kTriangleBand, last); ++j) {
      for (int64_t i = std::max(first, j + 1); i < last; ++i) s[j * stride + i] = s[i * stride + j];
    }
  }
}

}  // namespace

template <class A>
void copy_triangle_cpu(const Triangle<A>& args, TriangleCopy what, std::atomic<int64_t>& next) {
  const int64_t per_member = triangle_bands(1, args.d);
  for (int64_t band = next++; band < args.batch * per_member; band = next++) {
    const int64_t member = band / per_member, first = band % per_member * kTriangleBand;
    const int64_t last = std::min(first + kTriangleBand, args.d);
    A* const square = args.square + member * args.square_batch_stride;
    A* const packed = args.packed + member * args.packed_batch_stride;
    for (int64_t i = first; i < last && what != TriangleCopy::symmetrize; ++i) {
      A* const row = square + i * args.square_row_stride;
      A* const packed_row = packed + triangle_count(i);
      if (what == TriangleCopy::pack) {
        std::copy_n(row, i + 1, packed_row);
      } else {
        std::copy_n(packed_row, i + 1, row);
      }
    }
    if (what != TriangleCopy::pack) mirror_rows(square, args.square_row_stride, first, last);
  }
}

template void copy_triangle_cpu(const Triangle<float>&, TriangleCopy, std::atomic<int64_t>&);
template void copy_triangle_cpu(const Triangle<double>&, TriangleCopy, std::atomic<int64_t>&);

}  // namespace sst
