// The small steps of the Rayleigh–Ritz iteration (kernels/ritz.h), by the CPU functions and as the CUDA kernels do
// them, thread after thread in both directions (emulated_block.h), which must agree bit for bit. What is expected
// follows from the definitions in ritz.h alone. Outputs and workspaces start as NaN, and every buffer ends where its
// data end.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <limits>
#include <vector>

#include "emulated_block.h"
#include "kernels/ritz_block.h"

namespace {

using namespace sst;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN(), kInf = std::numeric_limits<double>::infinity();
constexpr int kThreads = cuda::kRitzThreads;

double random_number() { return static_cast<double>(random_bits()) / 32768 - 1; }

bool same(const std::vector<double>& a, const std::vector<double>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(double)) == 0;
}

// step(way) for the CPU function (0) and for the block of threads forwards (1) and backwards (2).
template <class Args, class Body>
void run(int way, const Args& args, void (*cpu)(const Args&, std::atomic<int64_t>&), Body body) {
  if (way == 0) {
    std::atomic<int64_t> next{0};
    return cpu(args, next);
  }
  for (int64_t pencil = 0; pencil < args.batch; ++pencil) {
    EmulatedBlock block(kThreads, 0, way == 2);
    body(block, args, pencil);
  }
}

// H of two pencils, the second not finite in a row of a vector if `broken`; NaN above the diagonals, between rows,
// and in rows of no vector.
void test_matrix(int64_t m, bool broken) {
  const int64_t row = m + 3, batch = 2;
  std::vector<double> h(batch * m * row, kNaN), valid(batch * (m + 1), kNaN);
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t i = 0; i < m; ++i) valid[b * (m + 1) + i] = i % 3 != 1;
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t j = 0; j <= i; ++j) {
        if (i % 3 != 1 && j % 3 != 1) h[(b * m + i) * row + j] = small_integer();
      }
    }
  }
  if (broken) h[(m + m - 1 - (m % 3 == 2)) * row] = random_bits() % 2 ? kInf : kNaN;
  std::vector<double> first;
  for (int way = 0; way < 3; ++way) {
    std::vector<double> out(batch * m * m, kNaN), sorted(batch * m, kNaN), flags(batch, kNaN), largest(batch, kNaN);
    const RitzMatrix args{batch, m,          h.data(),      m * row,      row,           valid.data(),
                          m + 1, out.data(), sorted.data(), flags.data(), largest.data()};
    run(way, args, ritz_matrix_cpu,
        [](auto& block, const auto& a, int64_t p) { cuda::ritz_matrix<kThreads>(block, a, p); });
    for (int64_t b = 0; b < batch; ++b) {
      double peak = 0;
      int64_t vectors = 0;
      for (int64_t i = 0; i < m; ++i) {
        vectors += i % 3 != 1;
        for (int64_t j = 0; j <= i; ++j) {
          const double x = h[(b * m + i) * row + j];
          if (i % 3 != 1 && j % 3 != 1) peak = std::max(peak, std::abs(x));
        }
      }
      const bool bad = broken && b == 1;
      expect(flags[b] == bad, "ritz_matrix: what is not finite is told");
      for (int64_t i = 0; i < m; ++i) {
        expect(sorted[b * m + i] == (i < vectors), "ritz_matrix: as many vectors first as there are");
        for (int64_t j = 0; j < m; ++j) {
          double expected = i == j;
          if (!bad && i % 3 != 1 && j % 3 != 1) expected = -h[(b * m + std::max(i, j)) * row + std::min(i, j)];
          if (!bad && i == j && i % 3 == 1) expected = peak > 0 ? static_cast<double>(m) * peak : 1;
          expect(out[(b * m + i) * m + j] == expected, "ritz_matrix: −H, rows of no vector apart");
        }
      }
    }
    if (way == 0) first = out;
    expect(same(out, first), "ritz_matrix: the same on both devices");
  }
}

// T (p, n) beside the orthonormal S = e_0 … e_(m − 1), B = I. Rows of T: random, a zero row, a multiple of a row before
// it, one within the span of S.
struct Block {
  int64_t m, p, n, independent = 0;
  std::vector<double> t;
  Block(int64_t m, int64_t p) : m(m), p(p), n(m + p + 2), t(p * n) {
    for (int64_t i = 0; i < p; ++i) {
      const int kind = i == 0 ? 0 : static_cast<int>(i) % 5;
      for (int64_t l = 0; l < n; ++l) t[i * n + l] = kind == 1 && i > 1 ? 0 : random_number();
      for (int64_t l = 0; l < n && kind == 3; ++l) t[i * n + l] = -2 * t[l];
      for (int64_t l = m; l < n && kind == 4; ++l) t[i * n + l] = 0;
      independent += !(kind == 1 && i > 1) && kind != 3 && kind != 4;
    }
  }
};

void test_orthonormalizer(int64_t m, int64_t p) {
  const Block blocks[2] = {Block(m, p), Block(m, p)};
  const int64_t batch = 2, n = m + p + 2;
  std::vector<double> c(batch * m * p), g(batch * p * p), magnitude(batch * p, 1.0);
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t i = 0; i < p; ++i) {
      for (int64_t l = 0; l < m; ++l) c[(b * m + l) * p + i] = blocks[b].t[i * n + l];
      for (int64_t j = 0; j < p; ++j) {
        for (int64_t l = 0; l < n; ++l) g[(b * p + i) * p + j] += blocks[b].t[i * n + l] * blocks[b].t[j * n + l];
      }
    }
  }
  std::vector<double> first;
  for (int way = 0; way < 3; ++way) {
    std::vector<double> work(batch * (2 * p + 3) * p, kNaN), out(batch * p * (m + p), kNaN),
        valid(batch * (p + 1), kNaN), notes(2 * batch, 0);
    const Orthonormalizer args{batch, m,           p,          c.data(),     g.data(), magnitude.data(), 1e-8,
                               1e-13, work.data(), out.data(), valid.data(), p + 1,    notes.data()};
    run(way, args, orthonormalizer_cpu,
        [](auto& block, const auto& a, int64_t i) { cuda::orthonormalizer<kThreads>(block, a, i); });
    for (int64_t b = 0; b < batch; ++b) {
      std::vector<double> rows(p * n, 0);  // M [S; T]
      for (int64_t i = 0; i < p; ++i) {
        for (int64_t l = 0; l < n; ++l) {
          const double* const coefficients = out.data() + (b * p + i) * (m + p);
          double sum = l < m ? coefficients[l] : 0;
          for (int64_t j = 0; j < p; ++j) sum += coefficients[m + j] * blocks[b].t[j * n + l];
          rows[i * n + l] = sum;
        }
      }
      double count = 0;
      for (int64_t i = 0; i < p; ++i) {
        const double is_vector = valid[b * (p + 1) + i];
        expect(is_vector == 0 || is_vector == 1, "orthonormalizer: valid is 0 or 1");
        count += is_vector;
        for (int64_t l = 0; l < m; ++l) expect(std::abs(rows[i * n + l]) < 1e-10, "orthonormalizer: orthogonal to S");
        for (int64_t j = 0; j < p; ++j) {
          double sum = 0;
          for (int64_t l = 0; l < n; ++l) sum += rows[i * n + l] * rows[j * n + l];
          expect(std::abs(sum - (i == j ? is_vector : 0)) < 1e-10, "orthonormalizer: orthonormal, or zero rows");
        }
      }
      expect(count == static_cast<double>(blocks[b].independent), "orthonormalizer: drops what is dependent");
      expect(notes[2 * b] == 0 && (count == 0 || notes[2 * b + 1] > 1 - 1e-12), "orthonormalizer: notes");
    }
    if (way == 0) first = out;
    expect(same(out, first), "orthonormalizer: the same on both devices");
  }
}

// Diagonals of G below zero, by more or less than rounding, and NaN, with m = 0.
void test_faults() {
  const double entries[5] = {4, -1e-14, -1e-12, kNaN, 1};
  const bool vectors[5] = {true, false, false, false, true};
  const int64_t p = 5;
  std::vector<double> g(p * p, 0), magnitude(p, 1.0);
  for (int64_t i = 0; i < p; ++i) g[i * p + i] = entries[i];
  for (int way = 0; way < 3; ++way) {
    std::vector<double> work((2 * p + 3) * p, kNaN), out(p * p, kNaN), valid(p, kNaN), notes{1, 7};
    const Orthonormalizer args{1,     0,           p,          nullptr,      g.data(), magnitude.data(), 1e-8,
                               1e-13, work.data(), out.data(), valid.data(), p,        notes.data()};
    run(way, args, orthonormalizer_cpu,
        [](auto& block, const auto& a, int64_t i) { cuda::orthonormalizer<kThreads>(block, a, i); });
    expect(notes[0] == 2 && notes[1] == 7, "orthonormalizer: an indefinite B is counted, the largest 1/pivot kept");
    for (int64_t i = 0; i < p; ++i) {
      expect(valid[i] == vectors[i], "orthonormalizer: bad directions are dropped");
      for (int64_t j = 0; j < p; ++j) {
        expect(out[i * p + j] == (i == j && vectors[i] ? 1 / std::sqrt(entries[i]) : 0), "orthonormalizer: D alone");
      }
    }
  }
}

// Six pairs, four of them wanted: η = 0, 2⁻¹⁰, 2⁻⁴⁰ and 1 (no vector), the guard 2⁻⁸, one more.
void test_judge(double guard_tol, const std::vector<int64_t>& chosen) {
  const int64_t w = 6, p = static_cast<int64_t>(chosen.size());
  const bool guard = guard_tol < 1;
  // ‖r‖², ‖Ax‖², ‖Bx‖², ‖x‖²; with ‖A‖ = 8, ‖B‖ = 4 and θ = ±2 the size of a pair is 16 ‖x‖.
  const std::vector<double> squares{0,
                                    4,
                                    1,
                                    1,
                                    std::ldexp(1, -12),
                                    256,
                                    64,
                                    4,
                                    std::ldexp(1, -72),
                                    1,
                                    1,
                                    1,
                                    0,
                                    0,
                                    0,
                                    0,
                                    std::ldexp(1, -8),
                                    1,
                                    1,
                                    1,
                                    kNaN,
                                    1,
                                    1,
                                    1};
  const std::vector<double> theta{2, 2, -2, 2, 2, 2};
  const double eta[5] = {0, std::ldexp(1, -11), std::ldexp(1, -40), 1, std::ldexp(1, -8)};
  const double tol = std::ldexp(1, -30);
  for (int way = 0; way < 3; ++way) {
    std::vector<double> norms{1, 1}, out(w, kNaN), scale(p, kNaN), refill(p, kNaN), report(kReportSize, kNaN);
    std::vector<int64_t> places(p, -1);
    const Judge args{1,
                     w,
                     4,
                     p,
                     theta.data(),
                     w,
                     squares.data(),
                     tol,
                     guard_tol,
                     norms.data(),
                     out.data(),
                     places.data(),
                     scale.data(),
                     refill.data(),
                     report.data()};
    run(way, args, judge_cpu, [](auto& block, const auto& a, int64_t i) { cuda::judge<kThreads>(block, a, i); });
    expect(norms[0] == 8 && norms[1] == 4, "judge: norms");
    for (int i = 0; i < 5; ++i) expect(out[i] == eta[i], "judge: backward errors");
    expect(places == chosen, "judge: what to expand by");
    for (int64_t q = 0; q < p; ++q) {
      const double square = squares[4 * chosen[q]];
      expect(scale[q] == (square > 0 ? 1 / std::sqrt(square) : 0) && refill[q] == !(square > 0), "judge: scales");
    }
    expect(report[kLeading] == 1 && report[kUnconverged] == 2 && report[kWorst] == 1, "judge: convergence");
    expect(std::abs(report[kProgress] + (30 + 11 + 30) * std::log(2.0)) < 1e-12, "judge: progress");
    expect(report[kGuard] == guard && report[kGuardError] == (guard ? 0.0625 : 0), "judge: the guard");
    expect(report[kBroken] == 0, "judge: pairs beyond the window may be anything");
  }
}

// A = 0 has converged at once; without a guard; NaN among the wanted is told.
void test_judge_edges() {
  for (int way = 0; way < 3; ++way) {
    std::vector<double> squares{0, 0, 1, 1, kNaN, 1, 1, 1}, theta{0, 0}, norms(4, 0), out(2, kNaN), scale(2, kNaN),
        refill(2, kNaN), report(2 * kReportSize, kNaN);
    std::vector<int64_t> places(2, -1);
    const Judge args{2,
                     1,
                     1,
                     1,
                     theta.data(),
                     1,
                     squares.data(),
                     1e-10,
                     0.0,
                     norms.data(),
                     out.data(),
                     places.data(),
                     scale.data(),
                     refill.data(),
                     report.data()};
    run(way, args, judge_cpu, [](auto& block, const auto& a, int64_t i) { cuda::judge<kThreads>(block, a, i); });
    expect(out[0] == 0 && report[kLeading] == 1 && report[kBroken] == 0, "judge: A = 0");
    expect(report[kReportSize + kBroken] == 1 && report[kReportSize + kLeading] == 0, "judge: NaN");
    for (int b = 0; b < 2; ++b) {
      expect(places[b] == 0 && scale[b] == 0 && refill[b] == 1, "judge: nothing to expand by");
      expect(report[b * kReportSize + kGuard] == 0, "judge: no guard where there is no pair");
    }
  }
}

}  // namespace

int main() {
  for (int64_t m : {1, 2, 3, 17, 150}) {
    test_matrix(m, false);
    test_matrix(m, true);
  }
  for (int64_t p : {1, 2, 7, 16, 131}) {
    for (int64_t m : {0, 1, 40}) test_orthonormalizer(m, p);
  }
  test_faults();
  test_judge(0.001, {1, 3, 4, 5, 0, 2});
  test_judge(0.001, {1, 3});
  test_judge(kInf, {1, 3, 4});
  test_judge_edges();
  std::puts("ritz tests passed");
}
