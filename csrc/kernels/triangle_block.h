// The CUDA kernel of triangle.h, for a block of threads: it owns a 32 × 32 tile of the lower triangle of one member,
// and its mirror image, written by rows from shared memory. Rows there are 33 elements apart: a column lies in 32
// banks.
#pragma once

#include "block.h"
#include "triangle.h"

namespace sst::cuda {

struct TriangleTile {
  static constexpr int kThreads = 256, kSide = 32, kPitch = kSide + 1;
  template <class A>
  static constexpr int kSharedBytes = kSide * kPitch * sizeof(A);

  SST_HOST_DEVICE static int64_t tiles(int64_t d) { return triangle_count(ceil_div(d, kSide)); }
};

template <class A, class Block>
SST_DEVICE void copy_triangle_tile(Block& block, const Triangle<A>& args, TriangleCopy what, int64_t index) {
  constexpr int kSide = TriangleTile::kSide, kRows = TriangleTile::kThreads / kSide;
  const int64_t tiles = TriangleTile::tiles(args.d), member = index / tiles;
  const BlockIndex tile = triangle_block(index % tiles);
  const int64_t row0 = tile.row * kSide, col0 = tile.col * kSide;
  A* const square = args.square + member * args.square_batch_stride;
  A* const packed = args.packed + member * args.packed_batch_stride;
  const auto place = [](int row, int col) { return (row * TriangleTile::kPitch + col) * static_cast<int>(sizeof(A)); };

  block.each([&](int t) {
    const int c = t % kSide;
    SST_UNROLL
    for (int r = t / kSide; r < kSide; r += kRows) {
      const int64_t i = row0 + r, j = col0 + c;
      if (i >= args.d || j > i) continue;
      A* const in_square = square + i * args.square_row_stride + j;
      A* const in_packed = packed + triangle_count(i) + j;
      const A value = what == TriangleCopy::unpack ? *in_packed : *in_square;
      if (what == TriangleCopy::pack) *in_packed = value;
      if (what == TriangleCopy::unpack) *in_square = value;
      if (what != TriangleCopy::pack) block.store(t, place(r, c), value);
    }
  });
  if (what == TriangleCopy::pack) return;
  block.barrier();
  block.each([&](int t) {
    const int c = t % kSide;
    SST_UNROLL
    for (int r = t / kSide; r < kSide; r += kRows) {
      const int64_t i = col0 + r, j = row0 + c;
      if (j < args.d && i < j) square[i * args.square_row_stride + j] = block.template load<A>(t, place(c, r));
    }
  });
}

}  // namespace sst::cuda
