// torch's CPU threads for the kernels, which take their units of work from a common counter.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>

#include "kernels/schedule.h"

namespace sst {

// body(next) on one or more threads at once, `work` being the cost of all units in flops or bytes: a thread is worth
// starting for a million of them.
template <class Body>
void parallel(int64_t units, int64_t work, const Body& body) {
  constexpr int64_t least_work = 1 << 20;
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min({int64_t{torch::stable::get_num_threads()}, units, work / least_work + 1});
  if (threads <= 1) return body(next);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) { body(next); });
}

}  // namespace sst
