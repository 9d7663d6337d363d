#include "khatri_rao.h"

#include <memory>

#include "panel.h"

namespace sst {

namespace {

// out (rows, cols), the corner of a product that lies inside the result, = or += that corner.
template <class A>
void product_corner(const PanelRow<A>* p, const PanelRow<A>* q, int64_t count, A* out,
                    int64_t stride, int64_t rows, int64_t cols, bool add) {
  A c[kPanel][kPanel];
  panel_product(p, q, count, c[0], kPanel, false);
  for (int64_t i = 0; i < least(rows, kPanel); ++i, out += stride) {
    for (int64_t j = 0; j < least(cols, kPanel); ++j) out[j] = add ? out[j] + c[i][j] : c[i][j];
  }
}

}  // namespace

template <class T>
void khatri_rao_rows_cpu(const KhatriRao<T>& args, Range sequences) {
  using A = Accumulator<T>;
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
      pack_panels(args.a, block, false, a);
      pack_panels(args.b, block, true, b);
      for (int64_t i = 0; i < rows; i += kPanel) {
        for (int64_t j = 0; j < cols; j += kPanel) {
          const PanelRow<A>*p = b + i / kPanel * kTokens, *q = a + j / kPanel * kTokens;
          A* const out = args.out + (s * rows + i) * cols + j;
          if (i + kPanel <= rows && j + kPanel <= cols) {
            panel_product(p, q, block.count, out, cols, t > range.begin);
          } else {
            product_corner(p, q, block.count, out, cols, rows - i, cols - j, t > range.begin);
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
