#include "tile.h"

#include <algorithm>
#include <type_traits>

namespace sst {

namespace {

// Up to this many columns a float32 or float64 matrix serves as panels itself: a block of its rows fits the L1 cache.
constexpr int64_t kDirectCols = 32;

constexpr int64_t kOperand = kTileSide / kPanel * kPanelStride;

template <class T>
int64_t padded(const Rows<T>& x) {
  return ceil_div(x.cols, kPanel) * kPanel;
}

// Whether a block is packed as pairs of tokens.
template <class T>
bool as_pairs([[maybe_unused]] const TokenBlock<Accumulator<T>>& block) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return block.ones && kInstructionSets[instruction_set_in_use()].bfloat16_pairs;
  }
  return false;
}

template <class E, class A>
void multiply(const Panels<E>& p, const Panels<E>& q, int64_t count, const TileSum<A>& sum, bool add) {
  panel_product(instruction_set_in_use(), PanelProduct<E, A>{.p = p,
                                                             .q = q,
                                                             .count = count,
                                                             .rows = sum.rows,
                                                             .cols = sum.cols,
                                                             .c = sum.c,
                                                             .stride = sum.stride,
                                                             .add = add,
                                                             .part = sum.diagonal ? Part::lower : Part::all});
}

template <class E, class A>
Panels<E> packed_panels(const A* packed) {
  return {reinterpret_cast<const E*>(packed), kPanel, kPanelStride};
}

// The tokens of a block as they lie in memory, or nothing if they must be packed.
template <class T>
bool serves_as_panels(const Rows<T>& x, const TokenBlock<Accumulator<T>>& block) {
  return std::is_same_v<T, Accumulator<T>> && block.ones && block.contiguous && x.cols <= kDirectCols &&
         x.cols % kPanel == 0;
}

template <class T>
void accumulate_block(const TileOperands<T>& x, const TokenBlock<Accumulator<T>>& block,
                      const TileScratch<Accumulator<T>>& scratch, bool add) {
  const TileSum<Accumulator<T>> sum{scratch.c, padded(x.p), padded(x.q), padded(x.q), x.diagonal};
  if constexpr (std::is_same_v<T, Accumulator<T>>) {
    if (serves_as_panels(x.p, block) && serves_as_panels(x.q, block)) {
      const auto panels = [&](const Rows<T>& rows) {
        return Panels<T>{rows.data + block.token[0] * rows.stride, rows.stride, kPanel};
      };
      return multiply(panels(x.p), panels(x.q), block.count, sum, add);
    }
  }
  pack_block(x.q, block, false, scratch.q);
  const bool same = x.diagonal && block.ones;
  if (!same) pack_block(x.p, block, true, scratch.p);
  multiply_block<T>(same ? scratch.q : scratch.p, scratch.q, block, sum, add);
}

}  // namespace

template <class T>
void pack_block(const Rows<T>& x, const TokenBlock<Accumulator<T>>& block, bool weighted, Accumulator<T>* out) {
  const int set = instruction_set_in_use();
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (as_pairs<T>(block)) return void(pack_pairs(set, x, block, reinterpret_cast<BFloat16Pair*>(out)));
  }
  pack(set, x, block, weighted, out);
}

template <class T>
void multiply_block(const Accumulator<T>* p, const Accumulator<T>* q, const TokenBlock<Accumulator<T>>& block,
                    const TileSum<Accumulator<T>>& sum, bool add) {
  using A = Accumulator<T>;
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (as_pairs<T>(block)) {
      return multiply(packed_panels<BFloat16Pair>(p), packed_panels<BFloat16Pair>(q), ceil_div(block.count, 2), sum,
                      add);
    }
  }
  multiply(packed_panels<A>(p), packed_panels<A>(q), block.count, sum, add);
}

template <class A>
TileScratch<A>::TileScratch() : lines_(new Line[(2 * kOperand + kTileSide * kTileSide) * sizeof(A) / sizeof(Line)]) {
  p = reinterpret_cast<A*>(lines_.get());
  q = p + kOperand;
  c = q + kOperand;
}

template <class T>
int64_t accumulate_tile(const TileOperands<T>& x, const TileScratch<Accumulator<T>>& scratch) {
  int64_t t = x.tokens.begin;
  do {  // once for no tokens too, whose sum is zero
    const auto block = select_tokens(x.weight, {t, std::min(t + kTokens, x.tokens.end)});
    accumulate_block(x, block, scratch, t > x.tokens.begin);
    t += kTokens;
  } while (t < x.tokens.end);
  return padded(x.q);
}

#define SST_INSTANTIATE(T)                                                                                         \
  template void pack_block(const Rows<T>&, const TokenBlock<Accumulator<T>>&, bool, Accumulator<T>*);              \
  template void multiply_block<T>(const Accumulator<T>*, const Accumulator<T>*, const TokenBlock<Accumulator<T>>&, \
                                  const TileSum<Accumulator<T>>&, bool);                                           \
  template int64_t accumulate_tile(const TileOperands<T>&, const TileScratch<Accumulator<T>>&);
SST_INSTANTIATE(Half)
SST_INSTANTIATE(BFloat16)
SST_INSTANTIATE(float)
SST_INSTANTIATE(double)
template class TileScratch<float>;
template class TileScratch<double>;

}  // namespace sst
