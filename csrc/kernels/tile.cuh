// The CUDA kernels' one inner loop: a block of kThreads threads accumulates a kTile × kTile tile of
// Pᵀ diag(w) Q in registers, from kStep tokens at a time in shared memory.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "schedule.h"

namespace sst {

constexpr int kTile = 32;
constexpr int kStep = 16;
constexpr int kThreads = 256;                 // 16 × 16, row-major
constexpr int kSide = 16;                     // a thread owns rows and columns kSide apart
constexpr int kPer = kTile / kSide;           // of them, kPer × kPer elements
constexpr int kStageRows = kThreads / kTile;  // tokens loaded by one pass of the block

// A thread's part of the tile: element (r, c) is tile row row + r·kSide, column col + c·kSide.
template <class A>
struct TilePart {
  int row, col;
  A sum[kPer][kPer];

  __device__ TilePart() : row(threadIdx.x / kSide), col(threadIdx.x % kSide), sum{} {}
};

// part += Σ_{t ∈ tokens} w_t p_t q_tᵀ: kStep tokens are summed in order, then their sum is added,
// which keeps rounding errors of long sums small. Columns of p and q beyond their `cols` count as
// zero and, like tokens of weight 0, are not read. Called by the whole block, with equal arguments.
template <class T>
__device__ void accumulate_tile(const Rows<T>& p, const Rows<T>& q, const Accumulator<T>* weight,
                                Range tokens, TilePart<Accumulator<T>>& part) {
  using A = Accumulator<T>;
  __shared__ A staged_p[kStep][kTile];
  __shared__ A staged_q[kStep][kTile];
  const int col = threadIdx.x % kTile;
  for (int64_t first = tokens.begin; first < tokens.end; first += kStep) {
    for (int k = threadIdx.x / kTile; k < kStep; k += kStageRows) {
      const int64_t t = first + k;
      A w = A(0);
      if (t < tokens.end) w = weight ? weight[t] : A(1);
      const bool read = w != A(0);
      staged_p[k][col] = read && col < p.cols ? widen(p.data[t * p.stride + col]) * w : A(0);
      staged_q[k][col] = read && col < q.cols ? widen(q.data[t * q.stride + col]) : A(0);
    }
    __syncthreads();
    A step[kPer][kPer] = {};
#pragma unroll
    for (int k = 0; k < kStep; ++k) {
#pragma unroll
      for (int r = 0; r < kPer; ++r) {
#pragma unroll
        for (int c = 0; c < kPer; ++c) {
          step[r][c] += staged_p[k][part.row + r * kSide] * staged_q[k][part.col + c * kSide];
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kPer; ++r) {
#pragma unroll
      for (int c = 0; c < kPer; ++c) part.sum[r][c] += step[r][c];
    }
    __syncthreads();
  }
}

// Blocks to launch for `units` of work; the kernels loop where there are more units than blocks.
inline unsigned grid_size(int64_t units) { return static_cast<unsigned>(least(units, 0x7fffffff)); }

inline void check_launch(const char* name) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(name) +
                             ": CUDA launch failed: " + cudaGetErrorString(error));
  }
}

}  // namespace sst
