// symm_thin and symm_thin_pair: for every member of a batch, and one or two symmetric matrices,
//     Y_k = A_k X,   A_k (n, n) of which only the lower triangle, diagonal included, is read,   X (n, m), m small.
//
// Layout      A: rows of adjacent elements any distance apart, members any distance apart (0: one matrix for all).
//             X and Y: any strides; no two elements of any Y at one address. The caller owns all memory.
// Scheme      every element of A is read once and used twice: y_i += a_ij x_j, y_j += a_ij x_i. Rows fall into blocks;
//             a unit of work is the tile of A between two blocks, and adds to these two blocks of Y. The units are
//             ordered as the rounds of a tournament (Pairing), so that those of a round touch no block in common, and a
//             unit waits until both its blocks have been through all earlier rounds.
// CPU         a thread owns a unit, and takes units in order. X and Y are held as panels of some columns: by rows of
//             one or two vectors, or by columns where there are only one or two (symm_thin_tile.h).
// CUDA        a block of threads owns a tile and leaves partial products, added in order: symm_thin_block.h.
// Precision   fused multiply-add in the elements' type.
// Determinism every element is summed in an order that depends on the shapes and the instruction set alone: bit for bit
//             the same in every run, whatever the number of threads.
// Cost        2 n² m flops a matrix and member; reads half of A; the workspace holds X and the Ys again.
// Reference   sst_kernels/reference.py, symm_thin.
#pragma once

#include <atomic>
#include <memory>

#include "panel.h"

namespace sst {

// The matrices of a batch, (rows, columns) as their user knows.
template <class T>
struct Strided {
  T* data;
  int64_t batch_stride, row_stride, col_stride;

  SST_HOST_DEVICE T* at(int64_t member, int64_t col) const { return data + member * batch_stride + col * col_stride; }
};

template <class T>
struct SymmThin {
  int64_t matrices;  // 1 or 2
  Strided<const T> a[2], x;
  Strided<T> y[2];
  int64_t members, n, m;
};

// A tournament of `blocks` blocks: in round 0 each meets itself, in each later round each meets one other, or rests.
struct Pairing {
  int64_t blocks;

  int64_t pairs() const { return (blocks + 1) / 2; }               // of a round but the first
  int64_t rounds() const { return blocks > 1 ? 2 * pairs() : 1; }  // the first included
  int64_t units() const { return blocks + (rounds() - 1) * pairs(); }
  // Pair `index` of a round, row >= col; a block that rests meets the row `blocks`.
  BlockIndex pair(int64_t round, int64_t index) const;
};

// Members that are worked on together, with the memory they need: panels of X and of the Ys, and how many rounds each
// block of rows has been through.
template <class T>
class SymmThinCpu {
 public:
  // `threads` will work on it, with the instructions of kInstructionSets[set].
  SymmThinCpu(const SymmThin<T>& product, int64_t threads, int set = instruction_set_in_use());

  int64_t members() const { return members_; }                   // at a time
  int64_t workspace() const { return members_ * member_size_; }  // elements, 64-byte aligned
  int64_t units() const { return members_ * pairing_.units(); }

  // One thread's share of members [first, first + members()), as far as they exist: `pack` until no unit is left, then
  // `multiply`. Units are taken from `next`.
  void pack(int64_t first, T* workspace, std::atomic<int64_t>& next);
  void multiply(int64_t first, T* workspace, std::atomic<int64_t>& next);

 private:
  struct Unit;
  Unit unit(int64_t index, int64_t members) const;
  Range rows(int64_t block) const { return {block * block_, least((block + 1) * block_, product_.n)}; }
  int64_t count(int64_t first) const { return least(members_, product_.members - first); }
  template <class F>
  void for_blocks(BlockIndex tile, F f) const;
  void multiply_unit(int64_t member, BlockIndex tile, T* panels) const;
  void unpack(int64_t member, int64_t block, const T* panels) const;

  SymmThin<T> product_;
  int set_;
  int64_t block_, stride_, padded_, member_size_, members_;
  Pairing pairing_;
  std::unique_ptr<std::atomic<int64_t>[]> rounds_done_;
};

// CUDA: elements of the workspace, and all of it, in stream order. Throws std::runtime_error if a launch fails.
// `stream` is a cudaStream_t.
template <class T>
int64_t symm_thin_workspace_cuda(const SymmThin<T>& product);
template <class T>
void symm_thin_cuda(const SymmThin<T>& product, T* workspace, void* stream);

}  // namespace sst
