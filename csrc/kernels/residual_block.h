// The CUDA kernel of residual.h: one block of threads for a row. Each takes every kThreads-th element, kAhead of them
// read at a time; their sums are added pairwise.
#pragma once

#include "block.h"
#include "residual.h"

namespace sst::cuda {

struct ResidualBlock {
  static constexpr int kThreads = 256, kAhead = 4, kSharedBytes = kResidualNorms * kThreads * sizeof(double);
};

template <class T, class Block>
SST_DEVICE void residual_row(Block& block, const Residual<T>& args, int64_t index) {
  constexpr int kThreads = ResidualBlock::kThreads, kAhead = ResidualBlock::kAhead;
  const auto place = [](int t, int k) { return (k * kThreads + t) * static_cast<int>(sizeof(double)); };
  const int64_t member = index / args.rows, row = index % args.rows;
  const T *const ax = args.ax.at(member, row), *const bx = args.bx.at(member, row), *const x = args.x.at(member, row);
  T* const r = args.r + index * args.n;
  const double theta = *args.theta.at(member, row);
  block.each([&](int t) {
    double sums[kResidualNorms] = {};
    for (int64_t first = t; first < args.n; first += kThreads * kAhead) {
      T values[3][kAhead];
      SST_UNROLL
      for (int i = 0; i < kAhead; ++i) {
        const int64_t at = first + i * kThreads;
        values[0][i] = at < args.n ? ax[at] : 0;
        values[1][i] = at < args.n ? bx[at] : 0;
        values[2][i] = at < args.n ? x[at] : 0;
      }
      SST_UNROLL
      for (int i = 0; i < kAhead; ++i) {
        const int64_t at = first + i * kThreads;
        const double a = values[0][i], b = values[1][i], v = values[2][i];
        const T rounded = static_cast<T>(a - theta * b);
        if (at < args.n) r[at] = rounded;
        const double of_r = at < args.n ? rounded : 0;  // θ may be infinite
        sums[0] += of_r * of_r;
        sums[1] += a * a;
        sums[2] += b * b;
        sums[3] += v * v;
      }
    }
    SST_UNROLL
    for (int k = 0; k < kResidualNorms; ++k) block.store(t, place(t, k), sums[k]);
  });
  block.barrier();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    block.each([&](int t) {
      if (t >= half) return;
      SST_UNROLL
      for (int k = 0; k < kResidualNorms; ++k) {
        const double other = block.template load<double>(t, place(t + half, k));
        block.store(t, place(t, k), block.template load<double>(t, place(t, k)) + other);
      }
    });
    block.barrier();
  }
  block.each([&](int t) {
    if (t < kResidualNorms) args.norms[index * kResidualNorms + t] = block.template load<double>(t, place(0, t));
  });
}

}  // namespace sst::cuda
