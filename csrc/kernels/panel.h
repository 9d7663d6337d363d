// The CPU kernels' one inner loop: products of packed panels.
//
// A panel holds kPanel columns of a matrix for up to kTokens of its rows ("tokens"), widened to the
// accumulator type, missing columns filled with zeros; a panel row fills whole cache lines.
#pragma once

#include <cstdint>

#include "schedule.h"

namespace sst {

constexpr int64_t kPanel = 16;
constexpr int64_t kTokens = 256;

template <class A>
struct alignas(64) PanelRow {
  A value[kPanel];
};

// The tokens of one block whose weight is not zero: only these are read from memory.
template <class A>
struct TokenBlock {
  int64_t count;
  int64_t token[kTokens];
  A weight[kTokens];
};

// Collects the tokens of `tokens` (at most kTokens of them); `weight` may be null, meaning ones.
template <class A>
TokenBlock<A> select_tokens(const A* weight, Range tokens);

// What the two functions below are compiled for, best first. They take an index into this list, of
// a set that the machine supports: the kernels pass instruction_set_in_use(), the best of those.
struct InstructionSet {
  const char* name;
  bool (*supported)();
};
extern const InstructionSet kInstructionSets[];
extern const int kNumInstructionSets;
int instruction_set_in_use();

// Packs all columns of x: panels[i · kTokens + k][j] = x[token_k, i · kPanel + j], times weight_k
// if `weighted`.
template <class T>
void pack_panels(int set, const Rows<T>& x, const TokenBlock<Accumulator<T>>& block, bool weighted,
                 PanelRow<Accumulator<T>>* panels);

// c (kPanel, kPanel; rows `stride` apart) = pᵀ q = Σ_k p_k q_kᵀ, added to what is there if `add`.
// 2 · kPanel² · count flops; reads each panel once from L1. The order of the sum over k is fixed;
// its rounding depends on the instruction set (fused or separate multiply-add).
template <class A>
void panel_product(int set, const PanelRow<A>* p, const PanelRow<A>* q, int64_t count, A* c,
                   int64_t stride, bool add);

}  // namespace sst
