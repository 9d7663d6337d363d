// The CUDA kernel of counts.h: one block of threads. Each sums every kThreads-th weight, kAhead of them read at a time;
// their sums are added pairwise.
#pragma once

#include "block.h"
#include "counts.h"

namespace sst::cuda {

struct CountsBlock {
  static constexpr int kThreads = 1024, kAhead = 8, kSharedBytes = kThreads * sizeof(double);
};

template <class A, class Block>
SST_DEVICE void add_counts(Block& block, const Counts<A>& args) {
  constexpr int kThreads = CountsBlock::kThreads, kAhead = CountsBlock::kAhead;
  const auto place = [](int t) { return t * static_cast<int>(sizeof(double)); };
  block.each([&](int t) {
    double sum = !args.weight && t == 0 ? static_cast<double>(args.n) : 0.0;
    for (int64_t first = t; args.weight && first < args.n; first += kThreads * kAhead) {
      A w[kAhead];
      SST_UNROLL
      for (int i = 0; i < kAhead; ++i) w[i] = first + i * kThreads < args.n ? args.weight[first + i * kThreads] : 0;
      SST_UNROLL
      for (int i = 0; i < kAhead; ++i) sum += w[i];
    }
    block.store(t, place(t), sum);
  });
  block.barrier();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    block.each([&](int t) {
      if (t >= half) return;
      const double other = block.template load<double>(t, place(t + half));
      block.store(t, place(t), block.template load<double>(t, place(t)) + other);
    });
    block.barrier();
  }
  block.each([&](int t) {
    if (t >= 2) return;
    double& count = args.counts[t];
    count = (args.beta == 0 ? 0 : args.beta * count) + block.template load<double>(t, place(0));
  });
}

}  // namespace sst::cuda
