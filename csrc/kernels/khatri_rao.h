// khatri_rao_rows: out[s] = vec(Σ_{t ∈ s} w_t b_t a_tᵀ), vec row-major:
//     out[s, i·r_a + j] = Σ_{t ∈ s} w_t b[t, i] a[t, j].
//
// Layout      a (tokens, r_a), b (tokens, r_b): rows any distance apart, elements of a row adjacent. weight (tokens),
//             adjacent, or null for ones; a token of weight 0 is not read. out (sequences, r_b · r_a), contiguous,
//             overwritten whole; the caller owns all memory.
// Sequences   tokens [offsets[s], offsets[s+1]), clamped into [0, tokens); decreasing means empty.
// CPU         a thread owns a sequence; scratch about 1 MiB a thread (tile.h).
// CUDA        a block of threads owns a tile of one out[s] (block_tile.h). One launch, no workspace, no waiting.
// Precision   float32 fused multiply-add (float64 for float64); on the CPU, products of bfloat16 pairs may be used.
// Determinism every element is summed in a fixed order: bit-identical between runs, whatever the number of threads.
// Cost        2 · tokens · r_a · r_b flops; reads a and b once a tile, writes out once.
// Reference   sst_kernels/reference.py, khatri_rao_rows.
#pragma once

#include <atomic>

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

// One thread's share: it takes sequences from `next` until none is left.
template <class T>
void khatri_rao_rows_cpu(const KhatriRao<T>& args, std::atomic<int64_t>& next);

// Throws std::runtime_error if the launch fails. `stream` is a cudaStream_t.
template <class T>
void khatri_rao_rows_cuda(const KhatriRao<T>& args, void* stream);

}  // namespace sst
