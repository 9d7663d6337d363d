// The CUDA kernels on the host, thread after thread (emulated_block.h), against plain loops: everything but the
// instructions themselves, which follow the PTX ISA here. Every buffer ends where its data end.
#include <cmath>
#include <limits>
#include <type_traits>

#include "emulated_block.h"
#include "kernels/counts_block.h"
#include "kernels/khatri_rao_block.h"
#include "kernels/syrk_block.h"
#include "kernels/triangle_block.h"

namespace {

using namespace sst;
using namespace sst::cuda;

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
bool backwards = false;

template <class T>
void fill_nan(std::vector<T>& x, int64_t first, int64_t count) {
  T nan;
  std::memset(&nan, 0xFF, sizeof nan);  // of every type
  std::fill_n(x.begin() + first, count, nan);
}

// f(block) as a block of threads, without bank conflicts.
template <class F>
void run_block(int threads, int shared_bytes, F f) {
  backwards = !backwards;
  EmulatedBlock block(threads, shared_bytes, backwards);
  f(block);
  expect(block.vector_conflicts == 0, "accesses of 16 bytes meet in no bank");
  expect(block.matrix_conflicts == 0, "rows of ldmatrix meet in no bank");
}

// Every element of a step is staged once, every element of a tile owned once in each group.
template <class Engine>
void test_engine() {
  using Mine = Share<Engine>;
  std::vector<int> staged(Engine::kStep * Mine::kRow), owned(Engine::kTile * Engine::kTile);
  for (int t = 0; t < Engine::kThreads; ++t) {
    for (int i = 0; i < Mine::kCount; ++i) ++staged[Mine::token(t, i) * Mine::kRow + Mine::column(t)];
    for (int r = 0; r < Engine::kRows; ++r) {
      for (int c = 0; c < Engine::kCols; ++c) {
        owned[Engine::row(t, r) * Engine::kTile + Engine::col(t, c)] += 1 << 8 * (Engine::group(t) % 4);
      }
    }
  }
  for (int count : staged) expect(count == 1, "a chunk is staged once");
  const int groups = Engine::kGroups == 1 ? 1 : 0x01010101 * (Engine::kGroups / 4);
  for (int count : owned) expect(count == groups, "an element is owned once");
  expect(kSharedBytes<Engine> <= 48 << 10, "shared memory that every device gives");
}

template <class T>
void test_engines() {
  for (Precision precision : {Precision::ieee, Precision::tf32, Precision::bf16x3}) {
    const auto test = [](auto engine) { test_engine<typename decltype(engine)::type>(); };
    for_each_syrk_engine<T, true>(precision, test);
    for_each_syrk_engine<T, false>(precision, test);
  }
}

// What syrk.cu does, without a device.
template <class T>
void run_syrk(const SyrkGroup<T>& group, Precision precision) {
  const auto run = [&](auto tag) {
    using Engine = typename decltype(tag)::type;
    for_each_launch(group, &TriangleSchedule::first_unit, unit_blocks<Engine>, [&](const SyrkLaunch<T>& launch) {
      for (int64_t i = 0; i < launch.blocks; ++i) {
        run_block(Engine::kThreads, kSharedBytes<Engine>, [&](auto& block) { syrk_unit<Engine>(block, launch, i); });
      }
    });
  };
  for_each_syrk_engine<T, true>(precision, run);
  for_each_syrk_engine<T, false>(precision, run);
  for_each_launch(group, &TriangleSchedule::first_sum, sum_blocks<T>, [&](const SyrkLaunch<T>& launch) {
    for (int64_t i = 0; i < launch.blocks; ++i) {
      run_block(SyrkSums::kThreads, SyrkSums::kSharedBytes<Accumulator<T>>,
                [&](auto& block) { syrk_sum(block, launch, i); });
    }
  });
}

enum class Weights { none, mask, general };

// A product with all it points to; what is not to be read or written holds NaN.
template <class T>
struct Case {
  using A = Accumulator<T>;
  int64_t batch, tokens, d, stride, row_stride, size;
  std::vector<T> x;
  std::vector<A> weight, before, s;
  A beta;

  Case(int64_t batch, int64_t tokens, int64_t d, int64_t padding, bool packed, Weights weights, A beta)
      : batch(batch),
        tokens(tokens),
        d(d),
        stride(d + padding),
        row_stride(packed ? 0 : d + padding),
        size(packed ? triangle_count(d) : d * (d + padding)),
        x(random_integers<T>(batch * tokens * stride)),
        before(random_integers<A>(batch * size)),
        beta(beta) {
    if (weights != Weights::none) weight = random_integers<A>(batch * tokens);
    if (weights == Weights::mask) {
      for (A& w : weight) w = w > 0;
    }
    for (size_t t = 0; t < weight.size(); ++t) {
      if (weight[t] == 0) fill_nan(x, t * stride, stride);
    }
    std::vector<bool> lower(batch * size);
    each_lower([&](int64_t, int64_t, int64_t, int64_t at) { lower[at] = true; });
    for (size_t i = 0; i < before.size(); ++i) {
      if (!lower[i] || beta == 0) before[i] = kNaN;
    }
    s = before;
  }

  template <class F>
  void each_lower(F f) const {
    for (int64_t m = 0; m < batch; ++m) {
      for (int64_t i = 0; i < d; ++i) {
        const int64_t row = row_stride ? i * row_stride : triangle_count(i);
        for (int64_t j = 0; j <= i; ++j) f(m, i, j, m * size + row + j);
      }
    }
  }

  double weight_at(int64_t m, int64_t t) const { return weight.empty() ? 1.0 : weight[m * tokens + t]; }
  double x_at(int64_t m, int64_t t, int64_t j) const { return widen(x[(m * tokens + t) * stride + j]); }

  Syrk<T> product() {
    return {{s.data(), size, row_stride},
            {x.data(), stride, d},
            tokens * stride,
            weight.empty() ? nullptr : weight.data(),
            tokens,
            A(2),
            beta};
  }

  // Calls f(what S holds, what it should hold, Σ |w x x|).
  template <class F>
  void compare(F f) const {
    std::vector<bool> lower(s.size());
    each_lower([&](int64_t m, int64_t i, int64_t j, int64_t at) {
      double sum = 0, absolute = 0;
      for (int64_t t = 0; t < tokens; ++t) {
        if (weight_at(m, t) == 0) continue;
        const double term = weight_at(m, t) * x_at(m, t, i) * x_at(m, t, j);
        sum += term;
        absolute += std::abs(term);
      }
      f(s[at], (beta == 0 ? 0 : beta * before[at]) + 2 * sum, absolute);
      lower[at] = true;
    });
    for (size_t i = 0; i < s.size(); ++i) expect(lower[i] || std::isnan(s[i]), "the upper triangle is left alone");
  }
};

template <class T>
void run_cases(std::vector<Case<T>>& cases, Precision precision) {
  std::vector<Syrk<T>> products;
  std::vector<TriangleSchedule> schedules(cases.size());
  for (size_t i = 0; i < cases.size(); ++i) {
    products.push_back(cases[i].product());
    schedules[i].members = cases[i].batch;
    schedules[i].d = cases[i].d;
    schedules[i].tokens = cases[i].tokens;
    schedules[i].tile = syrk_tile<T>(cases[i].d);
  }
  const auto count = static_cast<int64_t>(cases.size());
  const GroupTotals totals = schedule_group(schedules.data(), count, kSyrkTargetUnits, kSyrkLeastTokens);
  std::vector<Accumulator<T>> workspace(totals.workspace, kNaN);
  run_syrk(SyrkGroup<T>{products.data(), schedules.data(), count, workspace.data(), totals}, precision);
}

template <class T>
void test_syrk(Precision precision) {
  std::vector<Case<T>> cases;
  const auto add = [&](int64_t batch, int64_t tokens, int64_t d, int64_t padding) {
    for (Weights weights : {Weights::none, Weights::mask, Weights::general}) {
      cases.push_back({batch, tokens, d, padding, false, weights, Accumulator<T>(-1)});
      cases.push_back({batch, tokens, d, padding, true, weights, Accumulator<T>(0)});
    }
  };
  for (int64_t d : {1, 16, 24, 32, 40, 64}) add(2, 97, d, 0);
  add(1, 1300, 16, 8);  // in splits
  add(1, 9000, 3, 1);   // in many
  add(1, 600, 72, 0);
  add(2, 45, 136, 8);  // several tiles
  add(1, 513, 131, 2);
  for (int64_t tokens : {0, 1}) add(1, tokens, 17, 0);
  add(0, 5, 8, 0);
  for (int i = 0; i < 5; ++i) add(1, 3, 2 + i, 0);  // more of one engine than a launch holds
  add(3, 5, 0, 0);
  run_cases(cases, precision);
  for (const auto& c : cases) {
    c.compare([](double s, double expected, double) { expect(s == expected, "syrk is exact on small integers"); });
  }
}

// Values with all their bits: |error| <= bound · Σ |w x x|.
template <class T>
void test_syrk_rounding(Precision precision, double bound) {
  std::vector<Case<T>> cases;
  for (int64_t d : {16, 32, 64, 128, 72}) cases.push_back({1, 100, d, 0, false, Weights::general, Accumulator<T>(0)});
  for (auto& c : cases) {
    for (size_t i = 0; i < c.x.size(); ++i) {
      const float value = std::ldexp(static_cast<float>(random_bits() * 65536.0 + random_bits()) - 2147483648.0f, -31);
      if constexpr (std::is_same_v<T, float>) c.x[i] = value;
      if constexpr (std::is_same_v<T, BFloat16>) c.x[i] = {static_cast<uint16_t>(bits_from_float(value) >> 16)};
      if constexpr (std::is_same_v<T, Half>) c.x[i] = {static_cast<uint16_t>(random_bits() & 0xBFFF)};  // |x| < 2
    }
    for (auto& w : c.weight) w = std::ldexp(1.0f + std::ldexp(random_bits() * 65536.0f + random_bits(), -32), 3);
  }
  run_cases(cases, precision);
  double worst = 0;
  for (const auto& c : cases) {
    c.compare([&](double s, double expected, double absolute) {
      worst = std::max(worst, std::abs(s - expected) / (2 * absolute));
    });
  }
  expect(worst <= bound, "rounding errors are as small as the precision promises");
}

template <class T>
void test_khatri_rao(int64_t tokens, int64_t r_a, int64_t r_b, bool weighted, const std::vector<int64_t>& offsets) {
  using A = Accumulator<T>;
  auto a = random_integers<T>(tokens * r_a), b = random_integers<T>(tokens * r_b);
  const auto weight = random_integers<A>(tokens);
  for (int64_t t = 0; weighted && t < tokens; ++t) {
    if (weight[t] == 0) fill_nan(a, t * r_a, r_a);
  }
  const auto sequences = static_cast<int64_t>(offsets.size()) - 1;
  std::vector<A> out(sequences * r_a * r_b, kNaN);
  const KhatriRao<T> args{{a.data(), r_a, r_a},
                          {b.data(), r_b, r_b},
                          weighted ? weight.data() : nullptr,
                          {offsets.data(), true},
                          tokens,
                          sequences,
                          out.data()};
  visit_khatri_rao_engine(args, [&](auto tag) {
    using Engine = typename decltype(tag)::type;
    test_engine<Engine>();
    for (int64_t i = 0; i < sequences * khatri_rao_tiles<Engine>(args); ++i) {
      run_block(Engine::kThreads, kSharedBytes<Engine>, [&](auto& block) { khatri_rao_unit<Engine>(block, args, i); });
    }
  });
  for (int64_t s = 0; s < sequences; ++s) {
    const Range range = sequence_range(args.offsets, s, tokens);
    for (int64_t i = 0; i < r_b; ++i) {
      for (int64_t j = 0; j < r_a; ++j) {
        double sum = 0;
        for (int64_t t = range.begin; t < range.end; ++t) {
          const double w = weighted ? weight[t] : 1;
          if (w != 0) sum += w * widen(b[t * r_b + i]) * widen(a[t * r_a + j]);
        }
        expect(out[(s * r_b + i) * r_a + j] == sum, "khatri_rao_rows is exact on small integers");
      }
    }
  }
}

template <class A>
void test_triangle(int64_t batch, int64_t d) {
  const int64_t stride = d + 3, size = triangle_count(d);
  const auto at = [=](int64_t m, int64_t i, int64_t j) { return (m * d + i) * stride + j; };
  const auto run = [&](std::vector<A>& square, std::vector<A>& packed, TriangleCopy what) {
    const Triangle<A> args{square.data(), d * stride, stride, packed.data(), size + 5, batch, d};
    for (int64_t i = 0; i < batch * TriangleTile::tiles(d); ++i) {
      run_block(TriangleTile::kThreads, TriangleTile::kSharedBytes<A>,
                [&](auto& block) { copy_triangle_tile(block, args, what, i); });
    }
  };
  for (TriangleCopy what : {TriangleCopy::symmetrize, TriangleCopy::pack, TriangleCopy::unpack}) {
    auto square = random_integers<A>(batch * d * stride), packed = random_integers<A>(batch * (size + 5));
    const auto square0 = square, packed0 = packed;
    run(square, packed, what);
    for (int64_t m = 0; m < batch; ++m) {
      for (int64_t i = 0; i < d; ++i) {
        for (int64_t j = 0; j < stride; ++j) {
          const int64_t high = std::max(i, j), low = std::min(i, j),
                        in_packed = m * (size + 5) + triangle_count(high) + low;
          A expected = square0[at(m, i, j)];
          if (j < d && what == TriangleCopy::unpack) expected = packed0[in_packed];
          if (j < d && what == TriangleCopy::symmetrize) expected = square0[at(m, high, low)];
          expect(square[at(m, i, j)] == expected, "square triangle");
          if (j > i) continue;
          expect(packed[in_packed] == (what == TriangleCopy::pack ? square0[at(m, i, j)] : packed0[in_packed]),
                 "packed triangle");
        }
      }
      for (int64_t i = 0; i < 5; ++i) {
        expect(packed[m * (size + 5) + size + i] == packed0[m * (size + 5) + size + i], "between packed triangles");
      }
    }
  }
}

template <class A>
void test_counts(int64_t n, bool weighted, double beta) {
  const auto weight = random_integers<A>(n);
  const double before[2] = {beta == 0 ? kNaN : 5.0, beta == 0 ? kNaN : -7.0};
  double counts[2] = {before[0], before[1]}, sum = weighted ? 0 : static_cast<double>(n);
  for (int64_t t = 0; weighted && t < n; ++t) sum += weight[t];
  run_block(CountsBlock::kThreads, CountsBlock::kSharedBytes,
            [&](auto& block) { add_counts(block, Counts<A>{counts, weighted ? weight.data() : nullptr, n, beta}); });
  for (int i = 0; i < 2; ++i) expect(counts[i] == (beta == 0 ? 0 : beta * before[i]) + sum, "counts");
}

template <class T>
void test_type() {
  test_engines<T>();
  for (bool weighted : {false, true}) {
    test_khatri_rao<T>(300, 17, 35, weighted, {0, 5, 5, 290, 300});
    test_khatri_rao<T>(40, 16, 8, weighted, {-4, 3, 1, 99, 200});
    test_khatri_rao<T>(90, 32, 24, weighted, {0, 90});
    test_khatri_rao<T>(90, 80, 72, weighted, {0, 33, 90});
    test_khatri_rao<T>(0, 3, 3, weighted, {0, 0});
    test_khatri_rao<T>(4, 0, 3, weighted, {0, 4});
  }
}

}  // namespace

int main() {
  test_type<Half>();
  test_type<BFloat16>();
  test_type<float>();
  test_type<double>();
  test_syrk<Half>(Precision::ieee);
  test_syrk<BFloat16>(Precision::ieee);
  for (Precision precision : {Precision::ieee, Precision::tf32, Precision::bf16x3}) test_syrk<float>(precision);
  test_syrk<double>(Precision::ieee);
  test_syrk_rounding<Half>(Precision::ieee, 1e-6);
  test_syrk_rounding<BFloat16>(Precision::ieee, 1e-6);
  test_syrk_rounding<float>(Precision::ieee, 1e-6);
  test_syrk_rounding<float>(Precision::bf16x3, 2e-5);
  test_syrk_rounding<float>(Precision::tf32, 1e-3);
  for (int64_t d : {0, 1, 31, 32, 33, 70}) {
    test_triangle<float>(2, d);
    test_triangle<double>(1, d);
  }
  for (int64_t n : {0, 1, 1025, 20000}) {
    for (bool weighted : {false, true}) {
      test_counts<float>(n, weighted, -2);
      test_counts<double>(n, weighted, 0);
    }
  }
  std::puts("block tests passed");
}
