// The small dense steps of the Davidson iteration (kernels/ritz_block.h) by one thread, and by a block of threads run
// one after another in either direction, against what they mean: equal bits from all three, and plain loops beside
// them.
#include <cmath>
#include <limits>

#include "emulated_block.h"
#include "kernels/ritz_block.h"

namespace {

using namespace sst;
using namespace sst::cuda;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
using Doubles = std::vector<double>;

double uniform() { return static_cast<double>(random_bits() % 65536) / 32768 - 1; }
Doubles random_doubles(int64_t count) {
  Doubles x(count);
  for (double& value : x) value = uniform();
  return x;
}
bool same(const Doubles& x, const Doubles& y) {
  for (size_t i = 0; i < x.size(); ++i) {
    if (x[i] != y[i] && !(std::isnan(x[i]) && std::isnan(y[i]))) return false;
  }
  return x.size() == y.size();
}
bool near(double x, double y, double tolerance) { return std::fabs(x - y) <= tolerance; }

// The three ways to run a body; each writes results that were NaN before.
enum Way { kOneThread, kForwards, kBackwards, kWays };
template <class One, class Many>
void run(Way way, One one, Many many) {
  if (way == kOneThread) return one();
  EmulatedBlock block(kRitzThreads, 16, way == kBackwards);
  many(block);
}

// Pencils of m vectors, with room between their rows, some of which are no vectors; NaN in their places must not
// matter.
void test_ritz_matrix(int64_t m, bool spoil, bool zero) {
  const int64_t batch = 3, row = m + 2, stride = (m + 1) * row;
  Doubles h = random_doubles(batch * stride), valid(batch * (m + 1));
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t i = 0; i < m; ++i) {
      valid[b * (m + 1) + i] = b == 0 || random_bits() % 3 > 0;
      for (int64_t j = 0; j < m; ++j) {
        double& x = h[b * stride + i * row + j];
        if (zero) x = 0;
        if (j > i || valid[b * (m + 1) + i] == 0 || valid[b * (m + 1) + j] == 0) x = kNaN;
      }
    }
  }
  if (spoil) h[stride * 0 + (m - 1) * row] = kNaN;  // of the first pencil, all of whose rows are vectors
  Doubles out[kWays], sorted[kWays], broken[kWays], largest[kWays];
  for (int way = 0; way < kWays; ++way) {
    out[way].assign(batch * m * m, kNaN), sorted[way].assign(batch * m, kNaN);
    broken[way].assign(batch, kNaN), largest[way].assign(batch, kNaN);
    const RitzMatrix args{batch,
                          m,
                          h.data(),
                          stride,
                          row,
                          valid.data(),
                          m + 1,
                          out[way].data(),
                          sorted[way].data(),
                          broken[way].data(),
                          largest[way].data()};
    std::atomic<int64_t> next = 0;
    run(
        static_cast<Way>(way), [&] { ritz_matrix_cpu(args, next); },
        [&](auto& block) {
          for (int64_t b = 0; b < batch; ++b) ritz_matrix<kRitzThreads>(block, args, b);
        });
    expect(same(out[way], out[0]) && same(sorted[way], sorted[0]) && same(broken[way], broken[0]), "ritz_matrix: ways");
  }
  for (int64_t b = 0; b < batch; ++b) {
    const double* const mask = valid.data() + b * (m + 1);
    double most = 0, rank = 0;
    for (int64_t i = 0; i < m; ++i) {
      rank += mask[i];
      for (int64_t j = 0; j <= i; ++j) {
        if (mask[i] != 0 && mask[j] != 0) most = std::max(most, std::fabs(h[b * stride + i * row + j]));
      }
    }
    const bool is_broken = spoil && b == 0;
    expect(broken[0][b] == is_broken, "ritz_matrix: broken");
    for (int64_t i = 0; i < m; ++i) {
      expect(sorted[0][b * m + i] == (static_cast<double>(i) < rank), "ritz_matrix: vectors come first");
      for (int64_t j = 0; j < m; ++j) {
        const double x = out[0][(b * m + i) * m + j], lower = h[b * stride + std::max(i, j) * row + std::min(i, j)];
        if (is_broken) {
          expect(x == (i == j), "ritz_matrix: the identity in place of a broken one");
        } else if (mask[i] != 0 && mask[j] != 0) {
          expect(x == -lower, "ritz_matrix: -H");
        } else {
          // Gershgorin: no eigenvalue of -H exceeds m max |H|
          expect(x == (i == j ? (most > 0 ? static_cast<double>(m) * most : 1) : 0), "ritz_matrix: apart");
        }
      }
    }
  }
}

// S (m rows) orthonormal and T (p rows) of n numbers, B = I.
struct Vectors {
  int64_t m, p, n;
  Doubles s, t;
  Vectors(int64_t m, int64_t p, int64_t n) : m(m), p(p), n(n), s(random_doubles(m * n)), t(random_doubles(p * n)) {
    for (int64_t i = 0; i < m; ++i) {
      for (int pass = 0; pass < 2; ++pass) {
        for (int64_t j = 0; j < i; ++j) {
          const double c = dot(&s[i * n], &s[j * n]);
          for (int64_t l = 0; l < n; ++l) s[i * n + l] -= c * s[j * n + l];
        }
      }
      const double norm = std::sqrt(dot(&s[i * n], &s[i * n]));
      for (int64_t l = 0; l < n; ++l) s[i * n + l] /= norm;
    }
  }
  double dot(const double* x, const double* y) const {
    double sum = 0;
    for (int64_t l = 0; l < n; ++l) sum += x[l] * y[l];
    return sum;
  }
  Doubles c() const {
    Doubles x(m * p);
    for (int64_t e = 0; e < m * p; ++e) x[e] = dot(&s[e / p * n], &t[e % p * n]);
    return x;
  }
  Doubles g() const {
    Doubles x(p * p);
    for (int64_t e = 0; e < p * p; ++e) x[e] = dot(&t[e / p * n], &t[e % p * n]);
    return x;
  }
};

struct Result {
  Doubles out, valid, notes;
};
Result orthonormalize(int64_t m, int64_t p, const Doubles& c, const Doubles& g, const Doubles* magnitude,
                      const Doubles& notes, double drop) {
  Result result[kWays];
  for (int way = 0; way < kWays; ++way) {
    Result& r = result[way];
    r = {Doubles(p * (m + p), kNaN), Doubles(p, kNaN), notes};
    Doubles work((2 * p + 3) * p, kNaN);
    const Orthonormalizer args{1,
                               m,
                               p,
                               c.data(),
                               g.data(),
                               magnitude ? magnitude->data() : nullptr,
                               drop,
                               1e-13,
                               work.data(),
                               r.out.data(),
                               r.valid.data(),
                               p,
                               r.notes.data()};
    std::atomic<int64_t> next = 0;
    run(
        static_cast<Way>(way), [&] { orthonormalizer_cpu(args, next); },
        [&](auto& block) { orthonormalizer<kRitzThreads>(block, args, 0); });
    expect(same(r.out, result[0].out) && same(r.valid, result[0].valid) && same(r.notes, result[0].notes),
           "orthonormalizer: ways");
  }
  return result[0];
}

// M [S; T] is orthonormal, and orthogonal to S; its invalid rows are zero.
void expect_orthonormal(const Vectors& x, const Result& r, double tolerance) {
  Doubles rows(x.p * x.n);
  for (int64_t i = 0; i < x.p; ++i) {
    const double* const row = &r.out[i * (x.m + x.p)];
    for (int64_t j = 0; j < x.m + x.p; ++j) {
      if (r.valid[i] == 0) expect(row[j] == 0, "orthonormalizer: a dropped row is zero");
      if (row[j] == 0) continue;  // rows of NaN have no part
      const double* const from = j < x.m ? &x.s[j * x.n] : &x.t[(j - x.m) * x.n];
      for (int64_t l = 0; l < x.n; ++l) rows[i * x.n + l] += row[j] * from[l];
    }
  }
  for (int64_t i = 0; i < x.p; ++i) {
    for (int64_t j = 0; j < x.p; ++j) {
      const double expected = i == j ? r.valid[i] : 0;
      expect(near(x.dot(&rows[i * x.n], &rows[j * x.n]), expected, tolerance), "orthonormalizer: orthonormal");
    }
    for (int64_t j = 0; j < x.m; ++j) {
      expect(near(x.dot(&rows[i * x.n], &x.s[j * x.n]), 0, tolerance), "orthonormalizer: orthogonal to S");
    }
  }
}

void test_orthonormalizer(int64_t m, int64_t p) {
  const Vectors plain(m, p, m + p + 5);
  const Doubles none{0, 0};
  Result r = orthonormalize(m, p, plain.c(), plain.g(), nullptr, none, 1e-8);
  expect_orthonormal(plain, r, 1e-10);
  for (double valid : r.valid) expect(valid == 1, "orthonormalizer: nothing is dropped");
  expect(r.notes[0] == 0 && r.notes[1] >= 1, "orthonormalizer: notes");
  expect(orthonormalize(m, p, plain.c(), plain.g(), nullptr, {2, 1e300}, 1e-8).notes == Doubles{2, 1e300},
         "orthonormalizer: notes grow");
  if (p < 4) return;

  // Row 0 is zero, row 1 a multiple of row 2, the last in the span of S (or again a multiple).
  Vectors x = plain;
  for (int64_t l = 0; l < x.n; ++l) {
    x.t[l] = 0;
    x.t[x.n + l] = -1e5 * x.t[2 * x.n + l];
    x.t[(p - 1) * x.n + l] = m > 0 ? 3e-7 * x.s[l] : x.t[2 * x.n + l];
  }
  r = orthonormalize(m, p, x.c(), x.g(), nullptr, none, 1e-8);
  expect_orthonormal(x, r, 1e-10);
  double rank = 0;
  for (double valid : r.valid) rank += valid;
  expect(r.valid[0] == 0 && rank == static_cast<double>(p - 3), "orthonormalizer: dependent rows are dropped");

  // NaN in a row of T reaches its row and column of G and its column of C: that row alone is dropped.
  x = plain;
  x.t[3 * x.n] = kNaN;
  r = orthonormalize(m, p, x.c(), x.g(), nullptr, none, 1e-8);
  expect(r.valid[3] == 0 && r.valid[0] == 1, "orthonormalizer: a row of NaN is dropped");
  expect_orthonormal(x, r, 1e-10);

  // tBt < 0: no vector, and a note where that is no rounding.
  for (const double size : {1e-3, 1e-14}) {
    Doubles g = plain.g();
    g[0] = -size;
    Doubles c = plain.c(), magnitude(p, 1.0);
    r = orthonormalize(m, p, c, g, &magnitude, none, 1e-8);
    expect(r.valid[0] == 0, "orthonormalizer: a negative square is no vector");
    expect(r.notes[0] == (size > 1e-13), "orthonormalizer: B is not positive definite");
  }
}

void test_judge(int64_t w, int64_t window, int64_t p, bool spoil) {
  const int64_t batch = 4;
  const double tol = 1e-3, guard_tol = 1e-2;
  Doubles theta = random_doubles(batch * (w + 1)), squares(batch * w * 4), before(batch * 2, 0.5);
  for (int64_t e = 0; e < batch * w; ++e) {
    const double size[] = {1e-8, 1e-5, 1e-2, 0};
    squares[4 * e] = size[random_bits() % 4];
    for (int i = 1; i < 4; ++i) squares[4 * e + i] = 1 + uniform() / 2;
    if (random_bits() % 5 == 0) std::fill_n(&squares[4 * e], 4, 0.0);  // no vector
  }
  if (spoil) squares[0] = kNaN;
  struct {
    Doubles norms, eta, scale, refill, report;
    std::vector<int64_t> chosen;
  } got[kWays];
  for (int way = 0; way < kWays; ++way) {
    auto& r = got[way];
    r = {before,
         Doubles(batch * w, kNaN),
         Doubles(batch * p, kNaN),
         Doubles(batch * p, kNaN),
         Doubles(batch * kReportSize, kNaN),
         std::vector<int64_t>(batch * p, -1)};
    const Judge args{batch,          w,
                     window,         p,
                     theta.data(),   w + 1,
                     squares.data(), tol,
                     guard_tol,      r.norms.data(),
                     r.eta.data(),   r.chosen.data(),
                     r.scale.data(), r.refill.data(),
                     r.report.data()};
    std::atomic<int64_t> next = 0;
    run(
        static_cast<Way>(way), [&] { judge_cpu(args, next); },
        [&](auto& block) {
          for (int64_t b = 0; b < batch; ++b) judge<kRitzThreads>(block, args, b);
        });
    expect(same(r.norms, got[0].norms) && same(r.eta, got[0].eta) && same(r.scale, got[0].scale) &&
               same(r.refill, got[0].refill) && same(r.report, got[0].report) && r.chosen == got[0].chosen,
           "judge: ways");
  }
  const auto& r = got[0];
  for (int64_t b = 0; b < batch; ++b) {
    const auto square = [&](int64_t i, int part) { return squares[4 * (b * w + i) + part]; };
    double norm[2] = {0.5, 0.5};
    for (int64_t i = 0; i < w; ++i) {
      for (int side = 0; side < 2 && square(i, 3) > 0; ++side) {
        norm[side] = std::max(norm[side], std::sqrt(square(i, 1 + side) / square(i, 3)));
      }
    }
    expect(r.norms[2 * b] == norm[0] && r.norms[2 * b + 1] == norm[1], "judge: norms");
    std::vector<bool> needed(w);
    double unconverged = 0, worst = 0, progress = 0, leading = -1;
    for (int64_t i = 0; i < w; ++i) {
      const double size = (norm[0] + std::fabs(theta[b * (w + 1) + i]) * norm[1]) * std::sqrt(square(i, 3));
      const double eta = square(i, 3) == 0 && std::isfinite(square(i, 0)) ? 1 : std::sqrt(square(i, 0)) / size;
      const double got_eta = r.eta[b * w + i];
      expect(std::isnan(eta) ? std::isnan(got_eta) : near(got_eta, eta, 1e-14), "judge: eta");
      const double reach = theta[b * (w + 1) + i] + std::sqrt(square(i, 0) * square(i, 3));
      const bool reaches = eta > tol && i == window && reach >= theta[b * (w + 1) + i - 1];
      needed[i] = i < window ? !(eta <= tol) : i == window && (eta > guard_tol || reaches);
      if (i >= window) continue;
      if (needed[i] && leading < 0) leading = static_cast<double>(i);
      unconverged += needed[i];
      if (eta > worst) worst = eta;
      progress += std::log(std::max(tol, eta));
    }
    if (leading < 0) leading = static_cast<double>(window);
    const double* const report = &r.report[b * kReportSize];
    expect(report[kBroken] == (spoil && b == 0), "judge: broken");
    if (report[kBroken] > 0) continue;
    expect(report[kLeading] == leading && report[kUnconverged] == unconverged, "judge: converged pairs");
    expect(near(report[kWorst], worst, 1e-14) && near(report[kProgress], progress, 1e-12), "judge: progress");
    const bool guard = window < w && needed[window];
    expect(report[kGuard] == guard, "judge: guard");
    const double guard_error = guard ? std::sqrt(square(window, 0) * square(window, 3)) : 0;
    expect(near(report[kGuardError], guard_error, 1e-14), "judge: error of the guard");
    // The needed ones in order, then guards, then the rest; none twice.
    const auto rank = [&](int64_t i) { return needed[i] ? 0 : i >= window ? 1 : 2; };
    for (int64_t q = 0; q < p; ++q) {
      const int64_t i = r.chosen[b * p + q];
      expect(i >= 0 && i < w, "judge: chosen");
      if (q > 0) {
        const int64_t last = r.chosen[b * p + q - 1];
        expect(rank(last) < rank(i) || (rank(last) == rank(i) && last < i), "judge: order of the chosen");
      }
      const bool usable = square(i, 0) > 0;
      expect(r.refill[b * p + q] == !usable, "judge: refill");
      expect(near(r.scale[b * p + q], usable ? 1 / std::sqrt(square(i, 0)) : 0, 1e-9), "judge: scale");
    }
    int64_t before_last = 0;
    for (int64_t i = 0; i < w; ++i) {
      before_last += rank(i) < rank(r.chosen[b * p + p - 1]) ||
                     (rank(i) == rank(r.chosen[b * p + p - 1]) && i < r.chosen[b * p + p - 1]);
    }
    expect(before_last == p - 1, "judge: no better one is left out");
  }
}

}  // namespace

int main() {
  for (const int64_t m : {1, 2, 7, 130, 150}) {
    for (const bool spoil : {false, true}) {
      for (const bool zero : {false, true}) test_ritz_matrix(m, spoil, zero);
    }
  }
  for (const int64_t m : {0, 1, 9, 140}) {
    for (const int64_t p : {1, 4, 16, 131}) test_orthonormalizer(m, p);
  }
  for (int repeat = 0; repeat < 50; ++repeat) {
    for (const bool spoil : {false, true}) {
      test_judge(1, 1, 1, spoil);
      test_judge(2, 1, 2, spoil);
      test_judge(9, 8, 4, spoil);
      test_judge(16, 3, 16, spoil);
      test_judge(140, 135, 16, spoil);
    }
  }
  std::puts("ritz tests passed");
}
