// khatri_rao_rows: out[s] = vec(Σ_{t ∈ s} w_t b_t a_tᵀ), vec row-major:
//     out[s, i·r_a + j] = Σ_{t ∈ s} w_t b[t, i] a[t, j].
//
// Layout      a (tokens, r_a), b (tokens, r_b): rows any distance apart, elements of a row
// adjacent.
//             weight (tokens), adjacent, or null for ones; a token of weight 0 is not read.
//             out (sequences, r_b · r_a), contiguous, overwritten whole; the caller owns all
//             memory.
// Sequences   tokens [offsets[s], offsets[s+1]), clamped into [0, tokens); decreasing means empty.
// CPU         the caller's thread owns a range of sequences; scratch (r_a + r_b) · kTokens
// elements. CUDA        a block of 256 threads owns a 32 × 32 tile of one out[s], a thread 2 × 2
// elements of it;
//             4 KiB shared memory (float64: 8 KiB). One launch, no workspace, no host
//             synchronisation.
// Precision   float32 fused multiply-add (float64 for float64).
// Determinism every element is summed by one thread in a fixed order, kTokens (CUDA: kStep) tokens
// at
//             a time: bit-identical between runs, whatever the number of threads.
// Cost        2 · tokens · r_a · r_b flops; reads a and b once (CUDA: once per tile row or column),
//             writes out once.
// Reference   sst_kernels/reference.py, khatri_rao_rows.
#pragma once

#include "schedule.h"

namespace sst {

template <class T>
struct KhatriRao {
  Rows<T> a, b;
  const Accumulator<T>* weight;
  Offsets offsets;
  int64_t tokens, sequences;
  Accumulator<T>* out;
};

template <class T>
void khatri_rao_rows_cpu(const KhatriRao<T>& args, Range sequences);

// Throws std::runtime_error if the launch fails. `stream` is a cudaStream_t.
template <class T>
void khatri_rao_rows_cuda(const KhatriRao<T>& args, void* stream);

}  // namespace sst
