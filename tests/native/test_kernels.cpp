// The CPU kernels against plain loops, without torch, so that sanitizers see all of it: every
// buffer ends where its data end. Inputs are small integers, so float32 sums are exact and compared
// by ==.
#include <atomic>
#include <cmath>
#include <cstdio>
#include <new>
#include <vector>

#include "check.h"
#include "kernels/counts.h"
#include "kernels/khatri_rao.h"
#include "kernels/panel.h"
#include "kernels/syrk.h"
#include "kernels/tile.h"
#include "kernels/triangle.h"

namespace {

using namespace sst;

// Every half against its definition.
void test_half() {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const double sign = bits & 0x8000 ? -1.0 : 1.0;
    const float value = widen(Half{static_cast<uint16_t>(bits)});
    if (exponent == 31 && fraction) {
      expect(std::isnan(value), "half: NaN");
    } else {
      const double magnitude = exponent == 31  ? INFINITY
                               : exponent == 0 ? std::ldexp(fraction, -24)
                                               : std::ldexp(1024 + fraction, exponent - 25);
      expect(value == sign * magnitude && std::signbit(value) == (sign < 0), "half: value");
    }
  }
}

void test_triangle_block() {
  int64_t index = 0;
  for (int64_t row = 0; row < 2000; ++row) {
    for (int64_t col = 0; col <= row; ++col, ++index) {
      const BlockIndex block = triangle_block(index);
      expect(block.row == row && block.col == col, "triangle_block");
    }
  }
}

// 64-byte aligned, ending where its elements end.
template <class E>
struct Aligned {
  explicit Aligned(int64_t count) : data(static_cast<E*>(::operator new(count * sizeof(E), std::align_val_t(64)))) {}
  ~Aligned() { ::operator delete(data, std::align_val_t(64)); }
  E* data;
};

// Packed blocks multiplied by every instruction set: all widths up to two panels and a bit, tokens picked by weight,
// all of a tile or its lower triangle.
template <class T>
void test_blocks(const std::vector<Accumulator<T>>& weight) {
  using A = Accumulator<T>;
  const int64_t tokens = static_cast<int64_t>(weight.size());
  const TokenBlock<A> block = select_tokens(weight.data(), {0, tokens});
  for (int64_t cols = 1; cols < 3 * kPanel; cols += 5) {
    const int64_t width = ceil_div(cols, kPanel) * kPanel;
    const auto x = random_integers<T>(tokens * cols);
    Aligned<A> p(width / kPanel * kPanelStride), q(width / kPanel * kPanelStride), c(width * width);
    const Rows<T> rows{x.data(), cols, cols};
    pack_block(rows, block, true, p.data);
    pack_block(rows, block, false, q.data);
    for (bool diagonal : {false, true}) {
      for (int64_t k = 0; k < width * width; ++k) c.data[k] = A(5);
      multiply_block<T>(p.data, q.data, block, TileSum<A>{c.data, width, width, width, diagonal}, true);
      for (int64_t i = 0; i < cols; ++i) {
        for (int64_t j = 0; j < (diagonal ? i + 1 : cols); ++j) {
          A sum = A(5);
          for (int64_t t = 0; t < tokens; ++t) sum += weight[t] * widen(x[t * cols + i]) * widen(x[t * cols + j]);
          expect(c.data[i * width + j] == sum, "multiply_block");
        }
      }
    }
  }
}

// The products of packed panels by every set that this machine supports.
template <class A>
void test_panel_product() {
  for (int set = 0; set < kNumInstructionSets; ++set) {
    if (!kInstructionSets[set].supported()) continue;
    for (int64_t count : {0, 1, 37}) {
      constexpr int64_t panels = 3, width = panels * kPanel, stride = width + 3;
      Aligned<A> p(panels * kPanelStride), q(panels * kPanelStride);
      for (int64_t k = 0; k < panels * kPanelStride; ++k) {
        p.data[k] = static_cast<A>(small_integer());
        q.data[k] = static_cast<A>(small_integer());
      }
      for (bool add : {false, true}) {
        std::vector<A> c(width * stride, A(5));
        panel_product(set, PanelProduct<A, A>{.p = {p.data, kPanel, kPanelStride},
                                              .q = {q.data, kPanel, kPanelStride},
                                              .count = count,
                                              .rows = width,
                                              .cols = width,
                                              .c = c.data(),
                                              .stride = stride,
                                              .add = add,
                                              .part = Part::all});
        for (int64_t i = 0; i < width; ++i) {
          for (int64_t j = 0; j < stride; ++j) {
            A sum = add || j >= width ? A(5) : A(0);
            const auto at = [](const A* data, int64_t k, int64_t col) {
              return data[col / kPanel * kPanelStride + k * kPanel + col % kPanel];
            };
            for (int64_t k = 0; j < width && k < count; ++k) sum += at(p.data, k, i) * at(q.data, k, j);
            expect(c[i * stride + j] == sum, kInstructionSets[set].name);
          }
        }
      }
    }
  }
}

void test_select_tokens() {
  const std::vector<float> weight = {1, 0, -2, 3, 0};
  const TokenBlock<float> some = select_tokens(weight.data(), {0, 5});
  expect(some.count == 3 && some.token[2] == 3 && some.weight[1] == -2 && !some.ones && !some.contiguous, "selected");
  const TokenBlock<float> all = select_tokens<float>(nullptr, {7, 9});
  expect(all.count == 2 && all.token[0] == 7 && all.ones && all.contiguous, "all tokens");
}

template <class T, class Index>
void test_khatri_rao(int64_t tokens, int64_t r_a, int64_t r_b, const std::vector<Index>& offsets) {
  using A = Accumulator<T>;
  const auto a = random_integers<T>(tokens * r_a), b = random_integers<T>(tokens * r_b);
  const auto weight = random_integers<A>(tokens);
  const int64_t sequences = static_cast<int64_t>(offsets.size()) - 1;
  std::vector<A> out(sequences * r_a * r_b, A(NAN));
  const KhatriRao<T> args{{a.data(), r_a, r_a},
                          {b.data(), r_b, r_b},
                          weight.data(),
                          {offsets.data(), sizeof(Index) == 8},
                          tokens,
                          sequences,
                          out.data()};
  std::atomic<int64_t> next{0};
  khatri_rao_rows_cpu(args, next);
  for (int64_t s = 0; s < sequences; ++s) {
    const int64_t begin = clamp(offsets[s], 0, tokens), end = clamp(offsets[s + 1], 0, tokens);
    for (int64_t i = 0; i < r_b; ++i) {
      for (int64_t j = 0; j < r_a; ++j) {
        A sum = 0;
        for (int64_t t = begin; t < end; ++t) {
          sum += weight[t] * widen(b[t * r_b + i]) * widen(a[t * r_a + j]);
        }
        expect(out[(s * r_b + i) * r_a + j] == sum, "khatri_rao_rows");
      }
    }
  }
}

template <class T>
void run_syrk(const Syrk<T>& product, TriangleSchedule schedule) {
  using A = Accumulator<T>;
  std::atomic<int64_t> next{0};
  if (schedule.d <= kSyrkNarrow) {
    const GroupTotals totals = schedule_syrk_cpu(&schedule, 1);
    std::vector<A> workspace(totals.workspace);
    const SyrkGroup<T> group{&product, &schedule, 1, workspace.data(), totals};
    syrk_units_cpu(group, next);
    next = 0;
    if (totals.workspace > 0) syrk_sum_cpu(group, next);
    return;
  }
  for (const auto& cohort : syrk_cohorts_cpu(&product, &schedule, 1)) {
    Aligned<A> workspace(cohort.workspace);
    for (int64_t step = 0; step < cohort.steps; ++step) {
      next = 0;
      syrk_pack_cpu(cohort, step, workspace.data, next);
      next = 0;
      syrk_multiply_cpu(cohort, step, workspace.data, next);
    }
  }
}

template <class T>
void test_syrk(int64_t batch, int64_t tokens, int64_t d, bool weighted) {
  using A = Accumulator<T>;
  const auto x = random_integers<T>(batch * tokens * d);
  const auto weight = weighted ? random_integers<A>(batch * tokens) : std::vector<A>(batch * tokens, A(1));
  const auto before = random_integers<A>(batch * d * d);
  auto s = before;
  run_syrk(Syrk<T>{.s = {s.data(), d * d, d},
                   .x = {x.data(), d, d},
                   .x_batch_stride = tokens * d,
                   .weight = weighted ? weight.data() : nullptr,
                   .weight_batch_stride = tokens,
                   .alpha = A(2),
                   .beta = A(-1)},
           {.members = batch, .d = d, .tokens = tokens});
  for (int64_t m = 0; m < batch; ++m) {
    for (int64_t i = 0; i < d; ++i) {
      for (int64_t j = 0; j < d; ++j) {
        A sum = 0;
        for (int64_t t = m * tokens; t < (m + 1) * tokens; ++t) {
          sum += weight[t] * widen(x[t * d + i]) * widen(x[t * d + j]);
        }
        const int64_t at = (m * d + i) * d + j;
        expect(s[at] == (j <= i ? A(2) * sum - before[at] : before[at]), "syrk_accumulate_");
      }
    }
  }
}

template <class A>
void test_triangle(int64_t batch, int64_t d) {
  const auto values = random_integers<A>(batch * d * d);
  auto square = values;
  std::vector<A> packed(batch * triangle_count(d)), back(batch * d * d);
  const auto run = [&](std::vector<A>& s, TriangleCopy what) {
    std::atomic<int64_t> next{0};
    const bool alone = what == TriangleCopy::symmetrize;
    copy_triangle_cpu(
        Triangle<A>{s.data(), d * d, d, alone ? nullptr : packed.data(), alone ? 0 : triangle_count(d), batch, d}, what,
        next);
  };
  run(square, TriangleCopy::pack);
  expect(square == values, "pack leaves the square");
  run(square, TriangleCopy::symmetrize);
  run(back, TriangleCopy::unpack);
  for (int64_t m = 0; m < batch; ++m) {
    for (int64_t i = 0; i < d; ++i) {
      for (int64_t j = 0; j <= i; ++j) {
        const int64_t at = m * d * d + i * d + j, mirrored = m * d * d + j * d + i;
        expect(packed[m * triangle_count(d) + triangle_count(i) + j] == values[at], "pack");
        expect(square[at] == values[at] && square[mirrored] == values[at], "symmetrize");
        expect(back[at] == values[at] && back[mirrored] == values[at], "unpack");
      }
    }
  }
}

void test_counts() {
  const std::vector<float> weight = {1, 0, 0.5f};
  double counts[2] = {2, NAN};
  add_counts_cpu(Counts<float>{counts, weight.data(), 3, 1.0});
  expect(counts[0] == 3.5 && std::isnan(counts[1]), "counts");
  add_counts_cpu(Counts<float>{counts, nullptr, 3, 0.0});
  expect(counts[0] == 3 && counts[1] == 3, "counts overwritten");
}

template <class T>
void test_ops() {
  using A = Accumulator<T>;
  test_blocks<T>({1, 0, -2, 3, 0, 2, 1});
  test_blocks<T>({1, 0, 1, 1, 0, 1});
  test_khatri_rao<T, int64_t>(300, 17, 35, {0, 5, 5, 290, 300});
  test_khatri_rao<T, int64_t>(9, 300, 20, {0, 9});
  test_khatri_rao<T, int32_t>(10, 16, 16, {-4, 3, 1, 99, 200});
  test_khatri_rao<T, int64_t>(0, 3, 3, {0, 0});
  test_khatri_rao<T, int64_t>(4, 0, 3, {0, 4});
  for (bool weighted : {false, true}) {
    test_syrk<T>(3, 300, 37, weighted);
    test_syrk<T>(1, 2500, 16, weighted);  // direct, split
    test_syrk<T>(1, 0, 5, weighted);
    test_syrk<T>(2, 9, 1, weighted);
    test_syrk<T>(2, 140, 273, weighted);  // wide
    test_syrk<T>(1, 0, 300, weighted);
  }
  test_triangle<A>(2, 70);
}

}  // namespace

int main() {
  test_half();
  test_triangle_block();
  test_select_tokens();
  test_panel_product<float>();
  test_panel_product<double>();
  test_counts();
  test_ops<Half>();
  test_ops<BFloat16>();
  test_ops<float>();
  test_ops<double>();
  test_syrk<float>(13, 1200, 260, true);  // wide, in two steps
  test_syrk<BFloat16>(13, 1200, 260, false);
  std::puts("native tests passed");
}
