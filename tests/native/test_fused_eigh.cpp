// fused_eigh natively: the CPU kernel by every instruction set that the machine has, and the CUDA kernel thread
// after thread (emulated_block.h), both by what defines the result: residuals and VᵀBV = I, in float64.
#include <cmath>
#include <limits>

#include "emulated_block.h"
#include "kernels/fused_eigh_block.h"
#include "kernels/panel.h"

namespace {

using namespace sst;
using namespace sst::cuda;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// Members with elements from -1 to 1 in A, and B = I + X Xᵀ / n; NaN above the diagonals, and between rows.
template <class T>
struct Pencils {
  int64_t batch, n, row;
  std::vector<T> a, b, values, vectors;
  std::vector<int32_t> info;

  Pencils(int64_t batch, int64_t n)
      : batch(batch),
        n(n),
        row(n + 2),
        a(batch * n * row, static_cast<T>(kNaN)),
        b(a),
        values(batch * n),
        vectors(batch * n * n),
        info(batch, -1) {
    const auto random = [] { return static_cast<double>(random_bits()) / 32768 - 1; };
    for (int64_t m = 0; m < batch; ++m) {
      std::vector<double> x(n * n);
      for (double& value : x) value = random();
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j <= i; ++j) {
          double sum = i == j;
          for (int64_t k = 0; k < n; ++k) sum += x[i * n + k] * x[j * n + k] / static_cast<double>(n);
          b[at(m, i, j)] = static_cast<T>(sum);
          a[at(m, i, j)] = static_cast<T>(random());
        }
      }
    }
  }

  int64_t at(int64_t m, int64_t i, int64_t j) const { return (m * n + i) * row + j; }
  double a_at(int64_t m, int64_t i, int64_t j) const { return a[at(m, std::max(i, j), std::min(i, j))]; }
  double b_at(int64_t m, int64_t i, int64_t j) const { return b[at(m, std::max(i, j), std::min(i, j))]; }
  double v_at(int64_t m, int64_t j, int64_t i) const { return vectors[(m * n + j) * n + i]; }

  FusedEigh<T> args() {
    return {
        {a.data(), n * row, row, 1}, {b.data(), n * row, row, 1}, values.data(), vectors.data(), info.data(), batch, n};
  }

  void check(int64_t m) const {
    const double allowed = 8 * std::sqrt(static_cast<double>(n)) * std::numeric_limits<T>::epsilon();
    double norm = 0;
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < n; ++j) norm += a_at(m, i, j) * a_at(m, i, j) + b_at(m, i, j) * b_at(m, i, j);
    }
    expect(info[m] == kFusedOk, "fused_eigh: solved");
    std::vector<double> bv(n);
    for (int64_t j = 0; j < n; ++j) {
      const double value = values[m * n + j];
      expect(j == 0 || value >= values[m * n + j - 1], "fused_eigh: ascending");
      double residual = 0;
      for (int64_t i = 0; i < n; ++i) {
        double av = 0;
        bv[i] = 0;
        for (int64_t k = 0; k < n; ++k) {
          av += a_at(m, i, k) * v_at(m, j, k);
          bv[i] += b_at(m, i, k) * v_at(m, j, k);
        }
        residual += (av - value * bv[i]) * (av - value * bv[i]);
      }
      expect(std::sqrt(residual) <= allowed * std::sqrt(norm) * (1 + std::abs(value)), "fused_eigh: residual");
      for (int64_t l = 0; l < n; ++l) {
        double product = 0;
        for (int64_t i = 0; i < n; ++i) product += v_at(m, l, i) * bv[i];
        expect(std::abs(product - (l == j)) <= 2 * allowed, "fused_eigh: B-orthonormal");
      }
    }
  }
};

template <class T, int Threads>
void run_blocks(Pencils<T>& pencils) {
  const FusedEigh<T> args = pencils.args();
  const FusedLayout<T> layout{static_cast<int>(pencils.n)};
  for (int64_t m = 0; m < pencils.batch; ++m) {
    EmulatedBlock block(Threads, layout.bytes(), m % 2 == 1);
    FusedBlock<T, Threads>{args, m, layout}.run(block);
  }
}

template <class T>
void run_lanes(Pencils<T>& pencils, int set) {
  std::atomic<int64_t> next{0};
  fused_eigh_cpu(set, pencils.args(), next);
}

template <class T, class Run>
void test(int64_t batch, int64_t n, Run run) {
  Pencils<T> pencils(batch, n);
  run(pencils);
  for (int64_t m = 0; m < batch; ++m) pencils.check(m);
}

// Each fault in its own slot; the last member is whole.
template <class T, class Run>
void test_faults(int64_t n, Run run) {
  constexpr T kMax = std::numeric_limits<T>::max();
  Pencils<T> pencils(6, n);
  pencils.a[pencils.at(0, n - 1, 0)] = static_cast<T>(kNaN);
  pencils.b[pencils.at(1, n - 1, n - 1)] = std::numeric_limits<T>::infinity();
  pencils.b[pencils.at(2, n - 1, n - 1)] = -1;
  pencils.b[pencils.at(3, 0, 0)] = 0;
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j <= i; ++j) {
      pencils.a[pencils.at(4, i, j)] = i == j ? kMax : 0;
      pencils.b[pencils.at(4, i, j)] = i == j ? T(0.25) : 0;
    }
  }
  run(pencils);
  const int32_t expected[] = {kFusedNotFinite, kFusedNotFinite, kFusedIndefinite, kFusedIndefinite, kFusedNotFinite};
  for (int64_t m = 0; m < 5; ++m) {
    expect(pencils.info[m] == expected[m], "fused_eigh: the fault is named");
    for (int64_t i = 0; i < n; ++i) expect(std::isnan(pencils.values[m * n + i]), "fused_eigh: no values");
    for (int64_t i = 0; i < n * n; ++i) expect(std::isnan(pencils.vectors[m * n * n + i]), "fused_eigh: no vectors");
  }
  pencils.check(5);
}

// Every two of n meet once.
void test_round_robin(int n) {
  std::vector<int> met(n * n);
  for (int round = 0; round < ((n - 1) | 1); ++round) {
    std::vector<bool> plays(n + 1);
    for (int k = 0; k < (n + 1) / 2; ++k) {
      const Pair pair = round_robin(n, round, k);
      expect(pair.q < pair.p && pair.p <= n, "round_robin: p > q");
      expect(!plays[pair.p] && !plays[pair.q], "round_robin: once a round");
      plays[pair.p] = plays[pair.q] = true;
      if (pair.p < n) ++met[pair.p * n + pair.q];
    }
  }
  for (int p = 0; p < n; ++p) {
    for (int q = 0; q < p; ++q) expect(met[p * n + q] == 1, "round_robin: all pairs");
  }
}

template <class T>
void test_type() {
  for (int set = 0; set < kNumInstructionSets; ++set) {
    if (!kInstructionSets[set].supported()) continue;
    const auto run = [set](Pencils<T>& pencils) { run_lanes(pencils, set); };
    for (int64_t n : {1, 2, 3, 4, 5, 16, 31, 64}) test<T>(11, n, run);
    test_faults<T>(6, run);
  }
  for (int64_t n : {1, 2, 3, 4, 7, 16, 33}) test<T>(2, n, run_blocks<T, 64>);
  test<T>(1, 40, run_blocks<T, 256>);
  test_faults<T>(6, run_blocks<T, 128>);
}

}  // namespace

int main() {
  for (int n : {2, 3, 4, 7, 8, 33}) test_round_robin(n);
  expect(fused_layout_limit<float>(227 << 10) >= 128 && fused_layout_limit<double>(227 << 10) >= 96, "sm_90");
  expect(fused_layout_limit<float>(163 << 10) >= 128 && fused_layout_limit<double>(163 << 10) >= 64, "sm_80");
  test_type<float>();
  test_type<double>();
  std::puts("fused_eigh tests passed");
}
