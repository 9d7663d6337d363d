// The CPU kernels' one inner loop: products of panels.
//
// A panel holds kPanel columns of a matrix for up to kTokens of its rows ("tokens"). It is packed (widened to the
// accumulator type, weighted, missing columns filled with zeros), or, where the matrix is already of that type and as
// wide as its panels, the matrix itself.
#pragma once

#include <cstdint>

#include "schedule.h"

namespace sst {

constexpr int64_t kPanel = 16;
constexpr int64_t kTokens = 128;
// Elements from one packed panel to the next: a panel and a cache line, lest all panels meet in one set of the cache.
constexpr int64_t kPanelStride = kPanel * (kTokens + 1);

// Columns of a matrix as panels: element (k, j) at data[j / kPanel · panel_stride + k · row_stride + j % kPanel].
template <class E>
struct Panels {
  const E* data;
  int64_t row_stride, panel_stride;
};

// Two tokens' bfloat16 values of one column, the earlier one in the lower half: what dot-product instructions take.
struct BFloat16Pair {
  uint32_t bits;
};

// The tokens of one block whose weight is not zero: only these are read from memory.
template <class A>
struct TokenBlock {
  int64_t count;
  bool contiguous;  // token[k] = token[0] + k, and only token[0] is set
  bool ones;        // weight[k] = 1, and none is set
  int64_t token[kTokens];
  A weight[kTokens];
};

// Collects the tokens of `tokens` (at most kTokens of them); `weight` may be null, meaning ones.
template <class A>
TokenBlock<A> select_tokens(const A* weight, Range tokens);

// What the functions below are compiled for, best first. They take an index into this list, of a set that the machine
// supports: the kernels pass instruction_set_in_use(), the best of those.
struct InstructionSet {
  const char* name;
  bool (*supported)();
  bool bfloat16_pairs;  // panel_product takes BFloat16Pair
};
extern const InstructionSet kInstructionSets[];
extern const int kNumInstructionSets;
int instruction_set_in_use();

// Packs all columns of x: element (k, j) = x[token_k, j], times weight_k if `weighted`. Writes whole panels,
// ceil(x.cols / kPanel) of them, to `out` (kPanelStride elements each, 64-byte aligned).
template <class T>
void pack(int set, const Rows<T>& x, const TokenBlock<Accumulator<T>>& block, bool weighted, Accumulator<T>* out);
// The same without weights, two tokens to an element: (count + 1) / 2 of them, the last filled with zeros.
void pack_pairs(int set, const Rows<BFloat16>& x, const TokenBlock<float>& block, BFloat16Pair* out);

// Which part of a product is wanted.
enum class Part { all, lower };

// c (rows, cols; rows `stride` apart) = Σ_k p_k q_kᵀ, added to what is there if `add`; rows and cols are multiples of
// kPanel. Part::lower: p and q are columns of one matrix, and blocks wholly above the diagonal are left as they are.
// 2 · rows · cols · count flops (half for `lower`); q comes from L1 and p from L2 if a panel of 2 kPanel columns fits
// L1. The order of the sum over k is fixed; its rounding depends on the instruction set (fused or separate
// multiply-add).
template <class E, class A>
struct PanelProduct {
  Panels<E> p, q;
  int64_t count, rows, cols;
  A* c;
  int64_t stride;
  bool add;
  Part part;
};
template <class E, class A>
void panel_product(int set, const PanelProduct<E, A>& args);

}  // namespace sst
