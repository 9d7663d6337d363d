// counts[i] ← β counts[i] + Σ_t w_t for i = 0, 1, or n for null weights: how much a pair of Kronecker factors holds.
//
// Layout      counts (2) float64 adjacent; weight (n), adjacent, float or double.
// CPU         the caller's thread. CUDA: one block of 1024 threads; sums in a fixed order. β = 0 overwrites unread.
// Cost        reads n elements. Sums in float64: deterministic.
// Reference   sst_kernels/reference.py, kron_accumulate_.
#pragma once

#include <cstdint>

namespace sst {

template <class A>
struct Counts {
  double* counts;
  const A* weight;
  int64_t n;
  double beta;
};

template <class A>
void add_counts_cpu(const Counts<A>& args);

// Throws std::runtime_error if the launch fails. `stream` is a cudaStream_t.
template <class A>
void add_counts_cuda(const Counts<A>& args, void* stream);

}  // namespace sst
