#include "khatri_rao.h"

#include <memory>

#include "panel.h"

namespace sst {

namespace {

// out (rows, cols) ← the part of c that lies inside it, added to what is there if `add`.
template <class A>
void store_corner(const A (&c)[kPanel][kPanel], int64_t rows, int64_t cols, A* out, int64_t stride,
                  bool add) {
  for (int64_t i = 0; i < least(rows, kPanel); ++i, out += stride) {
    for (int64_t j = 0; j < least(cols, kPanel); ++j) out[j] = add ? out[j] + c[i][j] : c[i][j];
  }
}

}  // namespace

template <class T>
void khatri_rao_rows_cpu(const KhatriRao<T>& args, Range sequences) {
  using A = Accumulator<T>;
  const int set = instruction_set_in_use();
  const int64_t rows = args.b.cols, cols = args.a.cols;
  const int64_t a_size = ceil_div(cols, kPanel) * kTokens,
                b_size = ceil_div(rows, kPanel) * kTokens;
  const std::unique_ptr<PanelRow<A>[]> scratch(new PanelRow<A>[a_size + b_size]);
  PanelRow<A>*const a = scratch.get(), *const b = a + a_size;

  for (int64_t s = sequences.begin; s < sequences.end; ++s) {
    const Range range = sequence_range(args.offsets, s, args.tokens);
    int64_t t = range.begin;
    do {  // once for an empty sequence too, whose sum is zero
      const auto block = select_tokens(args.weight, {t, least(t + kTokens, range.end)});
      pack_panels(set, args.a, block, false, a);
      pack_panels(set, args.b, block, true, b);
      for (int64_t i = 0; i < rows; i += kPanel) {
        for (int64_t j = 0; j < cols; j += kPanel) {
          const PanelRow<A>*p = b + i / kPanel * kTokens, *q = a + j / kPanel * kTokens;
          A* const out = args.out + (s * rows + i) * cols + j;
          const bool add = t > range.begin;
          if (i + kPanel <= rows && j + kPanel <= cols) {
            panel_product(set, p, q, block.count, out, cols, add);
          } else {
            A c[kPanel][kPanel];
            panel_product(set, p, q, block.count, c[0], kPanel, false);
            store_corner(c, rows - i, cols - j, out, cols, add);
          }
        }
      }
      t += kTokens;
    } while (t < range.end);
  }
}

template void khatri_rao_rows_cpu(const KhatriRao<Half>&, Range);
template void khatri_rao_rows_cpu(const KhatriRao<BFloat16>&, Range);
template void khatri_rao_rows_cpu(const KhatriRao<float>&, Range);
template void khatri_rao_rows_cpu(const KhatriRao<double>&, Range);

}  // namespace sst
