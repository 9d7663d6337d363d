// solve_thin: for every member of a batch, Y = L⁻ᵀL⁻¹X, L (n, n) lower triangular, X (n, m), m small; on the CPU, where
// LAPACK's solves reach a quarter of the memory's speed.
//
// Layout      L is packed once into tiles (pack_factor). X and Y: vectors of n adjacent elements, one after the other.
// Scheme      the rows of X fall into blocks, one a unit of work: L⁻¹ downwards, x_i = L_ii⁻¹ (x_i − Σ_{j<i} L_ij x_j),
//             then L⁻ᵀ upwards, x_i = L_ii⁻ᵀ (x_i − Σ_{j>i} L_jiᵀ x_j). A unit waits for each x_j in its turn, so that
//             all threads are busy but for the first and the last few blocks.
// Precision   fused multiply-add in the elements' type. Deterministic, whatever the number of threads.
// Cost        2n²m flops and twice the n²/2 elements of the packed factor a member; the workspace holds X.
#pragma once

#include <atomic>
#include <memory>

#include "panel.h"

namespace sst {

// Rows of a tile: one of float32 is half of an L1 cache.
constexpr int64_t kSolveTile = 64;

// Elements of the packed factor of order n.
inline int64_t packed_factor_size(int64_t n) {
  return triangle_count(ceil_div(n, kSolveTile)) * kSolveTile * kSolveTile;
}

// Packs row `row` of the tiles of L: those below the diagonal negated, that on it inverted; a last row that is not full
// is completed by rows of I. `factor`: row-major, rows `stride` apart; only the lower triangle is read.
template <class T>
void pack_factor(const T* factor, int64_t stride, int64_t n, int64_t row, T* packed);

template <class T>
struct SolveThin {
  const T* factor;  // packed, of all members
  const T* x;       // (members, m, n)
  T* y;
  int64_t members, n, m;
};

template <class T>
class SolveThinCpu {
 public:
  explicit SolveThinCpu(const SolveThin<T>& problem, int set = instruction_set_in_use());

  int64_t workspace() const { return problem_.members * member_size_; }  // elements, 64-byte aligned
  int64_t units() const { return problem_.members * blocks_; }           // of each direction

  // One thread's share of L⁻¹X (first) or, `upwards`, of L⁻ᵀL⁻¹X (then), until no unit is left in `next`.
  void run(bool upwards, T* workspace, std::atomic<int64_t>& next);

 private:
  void down(int64_t member, int64_t block, T* workspace);
  void up(int64_t member, int64_t block, T* workspace);
  void wait_for(int64_t member, int64_t block, int steps) const;

  SolveThin<T> problem_;
  int set_;
  int64_t blocks_, padded_, member_size_;
  std::unique_ptr<std::atomic<int>[]> steps_done_;  // of each block: 1 once it is L⁻¹x, 2 once it is L⁻ᵀL⁻¹x
};

}  // namespace sst
