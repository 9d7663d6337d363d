#include "syrk.h"

#include <memory>

#include "panel.h"

namespace sst {

namespace {

// Visits the elements of S (d, d) inside one block's part of the lower triangle.
template <class A, class F>
void for_lower(const BlockIndex& block, A* s, int64_t stride, int64_t d, F f) {
  const int64_t row0 = block.row * kPanel, col0 = block.col * kPanel;
  for (int64_t i = row0; i < least(row0 + kPanel, d); ++i) {
    const int64_t width = least(col0 + kPanel, i + 1) - col0;
    for (int64_t j = 0; j < width; ++j) f(s[i * stride + col0 + j], i - row0, j);
  }
}

// One member of the batch; `blocks` counts within its triangle and is not empty.
template <class T>
void accumulate_member(const Syrk<T>& args, int64_t member, Range blocks,
                       PanelRow<Accumulator<T>>* scratch) {
  using A = Accumulator<T>;
  A* const s = args.s + member * args.s_batch_stride;
  const A* const weight = args.weight ? args.weight + member * args.weight_batch_stride : nullptr;
  const int set = instruction_set_in_use();
  const A alpha = args.alpha, beta = args.beta;
  const int64_t d = args.x.cols;
  Rows<T> x = args.x;
  x.data += member * args.x_batch_stride;

  const auto each_block = [&](auto visit) {
    BlockIndex block = triangle_block(blocks.begin);
    for (int64_t index = blocks.begin; index < blocks.end; ++index) {
      visit(block);
      block = block.col < block.row ? BlockIndex{block.row, block.col + 1}
                                    : BlockIndex{block.row + 1, 0};
    }
  };
  each_block([&](const BlockIndex& block) {
    for_lower(block, s, args.s_row_stride, d,
              [&](A& out, int64_t, int64_t) { out = beta == A(0) ? A(0) : beta * out; });
  });

  const int64_t panels = triangle_block(blocks.end - 1).row + 1;
  PanelRow<A>* const weighted = scratch + panels * kTokens;
  for (int64_t t = 0; t < args.tokens; t += kTokens) {
    const auto tokens = select_tokens(weight, {t, least(t + kTokens, args.tokens)});
    pack_panels(set, x.columns(0, panels * kPanel), tokens, false, scratch);
    int64_t weighted_row = -1;
    each_block([&](const BlockIndex& block) {
      if (block.row != weighted_row) {
        pack_panels(set, x.columns(block.row * kPanel, kPanel), tokens, true, weighted);
        weighted_row = block.row;
      }
      A c[kPanel][kPanel];
      panel_product(set, weighted, scratch + block.col * kTokens, tokens.count, c[0], kPanel,
                    false);
      for_lower(block, s, args.s_row_stride, d,
                [&](A& out, int64_t i, int64_t j) { out += alpha * c[i][j]; });
    });
  }
}

}  // namespace

template <class T>
int64_t syrk_blocks_cpu(const Syrk<T>& args) {
  return args.batch * triangle_count(ceil_div(args.x.cols, kPanel));
}

template <class T>
void syrk_accumulate_cpu(const Syrk<T>& args, Range blocks) {
  using A = Accumulator<T>;
  const int64_t panels = ceil_div(args.x.cols, kPanel), per_member = triangle_count(panels);
  const std::unique_ptr<PanelRow<A>[]> scratch(new PanelRow<A>[(panels + 1) * kTokens]);
  while (blocks.begin < blocks.end) {
    const int64_t member = blocks.begin / per_member, first = member * per_member;
    const int64_t end = least(blocks.end, first + per_member);
    accumulate_member(args, member, {blocks.begin - first, end - first}, scratch.get());
    blocks.begin = end;
  }
}

#define SST_INSTANTIATE(T)                          \
  template int64_t syrk_blocks_cpu(const Syrk<T>&); \
  template void syrk_accumulate_cpu(const Syrk<T>&, Range);
SST_INSTANTIATE(Half)
SST_INSTANTIATE(BFloat16)
SST_INSTANTIATE(float)
SST_INSTANTIATE(double)

}  // namespace sst
