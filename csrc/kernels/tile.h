// Tiles of Pᵀ diag(w) Q on the CPU, in a thread's own memory: what syrk and khatri_rao are made of (block_tile.h is the
// CUDA sister).
#pragma once

#include <memory>

#include "panel.h"

namespace sst {

// Columns of a tile at most: two packed operands and the tile fit the L2 cache.
constexpr int64_t kTileSide = 256;

// Packs the columns of x for a block of tokens, times their weights if `weighted`, in the form that multiply_block
// takes: ceil(x.cols / kPanel) · kPanelStride elements at `out`, 64-byte aligned. Where block.ones, `weighted` changes
// nothing.
template <class T>
void pack_block(const Rows<T>& x, const TokenBlock<Accumulator<T>>& block, bool weighted, Accumulator<T>* out);

// Where a tile is summed: rows and cols are multiples of kPanel; of a diagonal tile only the lower triangle is wanted,
// and above it c holds anything.
template <class A>
struct TileSum {
  A* c;
  int64_t rows, cols, stride;
  bool diagonal;
};

// c = Σ_k p_k q_kᵀ, or c += it if `add`, for operands that pack_block made of matrices of T for this block.
template <class T>
void multiply_block(const Accumulator<T>* p, const Accumulator<T>* q, const TokenBlock<Accumulator<T>>& block,
                    const TileSum<Accumulator<T>>& sum, bool add);

// A thread's memory: two packed operands and a tile.
template <class A>
class TileScratch {
 public:
  TileScratch();
  A *p, *q, *c;

 private:
  struct alignas(64) Line {
    char bytes[64];
  };
  std::unique_ptr<Line[]> lines_;
};

// A tile's operands: columns of two matrices, kTileSide at most, for a range of tokens.
template <class T>
struct TileOperands {
  Rows<T> p, q;
  const Accumulator<T>* weight;  // or null for ones; a token of weight 0 is not read
  Range tokens;
  bool diagonal;  // p is q, and only the lower triangle is wanted
};

// scratch.c[i · stride + j] = Σ_t w_t p[t, i] q[t, j], kTokens tokens at a time in order. Returns the stride, q's
// columns rounded up to whole panels.
template <class T>
int64_t accumulate_tile(const TileOperands<T>& x, const TileScratch<Accumulator<T>>& scratch);

}  // namespace sst
