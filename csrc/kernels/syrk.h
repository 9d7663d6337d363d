// syrk_accumulate_: lower triangle of S ← β S + α Xᵀ diag(w) X, for each member of a batch:
//     S[i, j] ← β S[i, j] + α Σ_t w_t x[t, i] x[t, j],   j <= i.
//
// Layout      X (batch, tokens, d): rows and batch members any distance apart, elements of a row
//             adjacent. weight (batch, tokens), tokens adjacent, or null for ones; a token of
//             weight 0 is not read. S (batch, d, d): elements of a row adjacent, no two elements at
//             one address, apart from X and weight. The caller owns all memory.
// Written     the lower triangle, diagonal included; never a byte of the upper. β = 0 overwrites
//             without reading.
// CPU         the caller's thread owns a range of kPanel × kPanel blocks of the batch's lower
//             triangles, counted by triangle_block; scratch d · kTokens elements at most.
// CUDA        a block of 256 threads owns a 32 × 32 tile of one lower triangle, a thread 2 × 2
//             elements of it; 4 KiB shared memory (float64: 8 KiB). One launch, no workspace.
// Precision   float32 fused multiply-add (float64 for float64).
// Determinism every element is summed by one thread in a fixed order, kTokens (CUDA: kStep) tokens
// at
//             a time: bit-identical between runs, whatever the number of threads.
// Cost        tokens · d · (d + 1) flops a member; reads X once a tile row and column, S once, and
//             writes S once (CPU: once every kTokens tokens).
// Reference   sst_kernels/reference.py, syrk_accumulate_.
#pragma once

#include "schedule.h"

namespace sst {

template <class T>
struct Syrk {
  Accumulator<T>* s;
  int64_t s_batch_stride, s_row_stride;
  Rows<T> x;  // of the first member; x.cols is d
  int64_t x_batch_stride;
  const Accumulator<T>* weight;
  int64_t weight_batch_stride;
  int64_t batch, tokens;
  Accumulator<T> alpha, beta;
};

// Blocks of all members together: the end of the range the CPU kernel may be given.
template <class T>
int64_t syrk_blocks_cpu(const Syrk<T>& args);

template <class T>
void syrk_accumulate_cpu(const Syrk<T>& args, Range blocks);

// Throws std::runtime_error if the launch fails. `stream` is a cudaStream_t.
template <class T>
void syrk_accumulate_cuda(const Syrk<T>& args, void* stream);

}  // namespace sst
