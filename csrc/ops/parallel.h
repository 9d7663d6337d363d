// torch's CPU threads for the kernels, which take a range of their units of work.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "kernels/schedule.h"

namespace sst {

// body(Range) over [0, units), `flops` being the cost of them all; a thread gets a million or more,
// below which starting it costs more than it saves.
template <class Body>
void parallel(int64_t units, int64_t flops, const Body& body) {
  constexpr int64_t least_flops = 1 << 20;
  const int64_t chunks = flops / least_flops + 1;
  torch::stable::parallel_for(0, units, ceil_div(units, chunks),
                              [&](int64_t begin, int64_t end) { body(Range{begin, end}); });
}

}  // namespace sst
