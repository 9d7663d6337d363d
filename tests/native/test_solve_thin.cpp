// solve_thin with several threads, by every instruction set that the machine has, against substitution in long double.
// NaN above the diagonal of L and between its rows; every buffer ends where its data end.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <vector>

#include "check.h"
#include "kernels/solve_thin.h"

namespace {

using namespace sst;

using Real = long double;

template <class T>
struct Case {
  int64_t members, n, m, stride;
  std::vector<T> factor, packed, x;
  std::vector<Real> expected;  // as X

  // Diagonals from 1 to 4, elsewhere multiples of 1/n, so that no element is lost in rounding.
  Case(int64_t members, int64_t n, int64_t m)
      : members(members),
        n(n),
        m(m),
        stride(n + 3),
        factor(members * n * stride - 3, static_cast<T>(NAN)),
        packed(members * packed_factor_size(n), static_cast<T>(NAN)),
        x(random_integers<T>(members * m * n)),
        expected(x.begin(), x.end()) {
    for (int64_t member = 0; member < members; ++member) {
      T* const l = factor.data() + member * n * stride;
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j < i; ++j) l[i * stride + j] = static_cast<T>(small_integer()) / static_cast<T>(n);
        l[i * stride + i] = static_cast<T>(1 + std::abs(small_integer()));
      }
      for (int64_t c = 0; c < m; ++c) substitute(l, expected.data() + (member * m + c) * n);
      for (int64_t row = 0; row < ceil_div(n, kSolveTile); ++row) {
        pack_factor(l, stride, n, row, packed.data() + member * packed_factor_size(n));
      }
    }
  }

  // y ← L⁻ᵀL⁻¹y.
  void substitute(const T* l, Real* y) const {
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < i; ++j) y[i] -= l[i * stride + j] * y[j];
      y[i] /= l[i * stride + i];
    }
    for (int64_t i = n - 1; i >= 0; --i) {
      for (int64_t j = i + 1; j < n; ++j) y[i] -= l[j * stride + i] * y[j];
      y[i] /= l[i * stride + i];
    }
  }

  void check(int set) const {
    std::vector<T> y(x.size(), static_cast<T>(NAN));
    SolveThinCpu<T> plan({packed.data(), x.data(), y.data(), members, n, m}, set);
    std::vector<T> workspace(plan.workspace(), static_cast<T>(NAN));
    for (const bool upwards : {false, true}) {
      run_threads([&](auto& next) { plan.run(upwards, workspace.data(), next); });
    }
    for (int64_t first = 0; first < members * m * n; first += n) {
      Real largest = 0;
      for (int64_t i = first; i < first + n; ++i) largest = std::max(largest, std::abs(expected[i]));
      for (int64_t i = first; i < first + n; ++i) {
        const Real error = std::abs(y[i] - expected[i]);
        expect(error <= 16 * std::numeric_limits<T>::epsilon() * largest, kInstructionSets[set].name);
      }
    }
  }
};

template <class T>
void test_type() {
  for (const int64_t n : {1, 63, 64, 65, 130, 200}) {
    for (const int64_t m : {1, 5, 8, 9, 16, 17, 33}) {
      const Case<T> test(3, n, m);
      for (int set = 0; set < kNumInstructionSets; ++set) {
        if (kInstructionSets[set].supported()) test.check(set);
      }
    }
  }
}

}  // namespace

int main() {
  test_type<float>();
  test_type<double>();
  std::puts("solve_thin tests passed");
}
