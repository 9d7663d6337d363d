// leading_eigh on the CPU, by every instruction set that the machine has and with several threads: values against those
// of Jacobi's method, vectors by their residuals and VᵀBV = I, and the certificates by the same, all in long double.
// NaN above the diagonals and between rows, every buffer ends where its data end.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <vector>

#include "check.h"
#include "kernels/leading_eigh.h"
#include "kernels/panel.h"

namespace {

using namespace sst;

using Real = long double;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// The eigenvalues of C (n, n), descending, by cyclic Jacobi.
std::vector<Real> jacobi(std::vector<Real> c, int64_t n) {
  const auto rotate = [](Real& x, Real& y, Real cosine, Real sine) {
    const Real old = x;
    x = cosine * old - sine * y;
    y = sine * old + cosine * y;
  };
  Real norm = 0, off = 1;
  for (const Real x : c) norm += x * x;
  const Real negligible = norm * std::numeric_limits<Real>::epsilon() * std::numeric_limits<Real>::epsilon();
  for (int sweep = 0; off > negligible && sweep < 30; ++sweep) {
    off = 0;
    for (int64_t p = 0; p < n; ++p) {
      for (int64_t q = 0; q < p; ++q) {
        const Real x = c[p * n + q];
        off += x * x;
        if (x == 0) continue;
        const Real tau = (c[q * n + q] - c[p * n + p]) / (2 * x);
        const Real t = (tau < 0 ? -1 : 1) / (std::abs(tau) + std::sqrt(1 + tau * tau));
        const Real cosine = 1 / std::sqrt(1 + t * t), sine = t * cosine;
        for (int64_t i = 0; i < n; ++i) rotate(c[i * n + p], c[i * n + q], cosine, sine);
        for (int64_t i = 0; i < n; ++i) rotate(c[p * n + i], c[q * n + i], cosine, sine);
      }
    }
  }
  expect(off <= negligible, "jacobi: converged");
  std::vector<Real> values(n);
  for (int64_t i = 0; i < n; ++i) values[i] = c[i * n + i];
  std::sort(values.rbegin(), values.rend());
  return values;
}

// A matrix of a member, whole.
using Whole = std::vector<Real>;

// The eigenvalues of A v = λ B v, descending: those of C = L⁻¹AL⁻ᵀ, B = LLᵀ.
std::vector<Real> eigenvalues(Whole a, Whole l, int64_t n) {
  for (int64_t j = 0; j < n; ++j) {
    for (int64_t i = j; i < n; ++i) {
      for (int64_t k = 0; k < j; ++k) l[i * n + j] -= l[i * n + k] * l[j * n + k];
      l[i * n + j] /= i == j ? std::sqrt(l[j * n + j]) : l[j * n + j];
    }
  }
  for (int side = 0; side < 2; ++side) {  // L⁻¹ from the left, of the transpose the second time
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t c = 0; c < n; ++c) {
        for (int64_t k = 0; k < i; ++k) a[i * n + c] -= l[i * n + k] * a[k * n + c];
        a[i * n + c] /= l[i * n + i];
      }
    }
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < i; ++j) std::swap(a[i * n + j], a[j * n + i]);
    }
  }
  return jacobi(a, n);
}

// Pencil (A, B) with its eigenvalues, descending, and ‖A‖₂ and ‖B‖₂.
struct Reference {
  Whole a, b;
  int64_t n;
  std::vector<Real> values = eigenvalues(a, b, n);
  Real norm_a = norm(a, n), norm_b = norm(b, n);

  static Real norm(const Whole& m, int64_t n) {
    const std::vector<Real> values = jacobi(m, n);
    return std::max(std::abs(values[0]), std::abs(values[n - 1]));
  }
};

// Members with elements from -1 to 1 in A, and B = I + X Xᵀ / n, by rows or by columns, two elements apart from the
// next.
template <class T>
struct Pencils {
  static constexpr double kEps = std::numeric_limits<T>::epsilon();
  int64_t batch, n, stride;
  bool columns;
  std::vector<T> a, b;

  Pencils(int64_t batch, int64_t n, bool columns)
      : batch(batch), n(n), stride(n + 2), columns(columns), a(batch * n * stride - 2, static_cast<T>(kNaN)), b(a) {
    const auto random = [] { return static_cast<double>(random_bits()) / 32768 - 1; };
    for (int64_t member = 0; member < batch; ++member) {
      std::vector<double> x(n * n);
      for (double& value : x) value = random();
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j <= i; ++j) {
          double sum = i == j;
          for (int64_t k = 0; k < n; ++k) sum += x[i * n + k] * x[j * n + k] / static_cast<double>(n);
          b[at(member, i, j)] = static_cast<T>(sum);
          a[at(member, i, j)] = static_cast<T>(random());
        }
      }
    }
  }

  int64_t at(int64_t member, int64_t i, int64_t j) const {
    return member * n * stride + (columns ? j * stride + i : i * stride + j);
  }
  Whole whole(const std::vector<T>& m, int64_t member) const {
    Whole out(n * n);
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j <= i; ++j) out[i * n + j] = out[j * n + i] = m[at(member, i, j)];
    }
    return out;
  }
  Reference reference(int64_t member) const { return {whole(a, member), whole(b, member), n}; }
  Matrices<T> matrices(const std::vector<T>& m) const {
    return {m.data(), n * stride, columns ? 1 : stride, columns ? stride : 1};
  }
};

// What leading_eigh returns.
template <class T>
struct Results {
  int64_t n, k, count;  // count: of values
  std::vector<T> values, vectors, errors, orthogonality;
  std::vector<int64_t> sound;

  Results(const Pencils<T>& pencils, int64_t k, int set)
      : n(pencils.n),
        k(k),
        count(std::min(k + 1, n)),
        values(pencils.batch * count, static_cast<T>(kNaN)),
        vectors(pencils.batch * n * k, static_cast<T>(kNaN)),
        errors(pencils.batch * k, static_cast<T>(kNaN)),
        orthogonality(pencils.batch, static_cast<T>(kNaN)),
        sound(pencils.batch, -1) {
    const LeadingEigh<T> args{pencils.matrices(pencils.a),
                              pencils.matrices(pencils.b),
                              values.data(),
                              vectors.data(),
                              errors.data(),
                              orthogonality.data(),
                              sound.data(),
                              pencils.batch,
                              n,
                              k,
                              4 * std::sqrt(static_cast<double>(n)) * Pencils<T>::kEps};
    run_threads([&](auto& next) { leading_eigh_cpu(set, args, next); });
  }

  // The certificate's own norms are estimates from below, of these pencils above 0.7 of the norm.
  void check(int64_t member, const Reference& pencil) const {
    const Whole &a = pencil.a, &b = pencil.b;
    const std::vector<Real>& expected = pencil.values;
    const double allowed = 4 * std::sqrt(static_cast<double>(n)) * Pencils<T>::kEps;
    const Real most = std::max(std::abs(expected[0]), std::abs(expected[n - 1]));
    const Real slack = 16 * n * std::numeric_limits<double>::epsilon(), rounded = 2 * Pencils<T>::kEps;
    const T* const v = vectors.data() + member * n * k;
    expect(sound[member] == 1, "leading_eigh: sound");
    for (int64_t i = 0; i < count; ++i) {
      expect(std::abs(values[member * count + i] - expected[i]) <= allowed * most, "leading_eigh: values");
    }
    Real apart = 0;
    std::vector<Real> bv(n);
    for (int64_t j = 0; j < k; ++j) {
      const Real value = values[member * count + j];
      Real residual = 0, square = 0;
      for (int64_t i = 0; i < n; ++i) {
        Real av = 0;
        bv[i] = 0;
        for (int64_t p = 0; p < n; ++p) {
          av += a[i * n + p] * v[p * k + j];
          bv[i] += b[i * n + p] * v[p * k + j];
        }
        residual += (av - value * bv[i]) * (av - value * bv[i]);
        square += static_cast<Real>(v[i * k + j]) * v[i * k + j];
      }
      residual = std::sqrt(residual / square);
      const Real least = residual / (pencil.norm_a + std::abs(value) * pencil.norm_b), error = errors[member * k + j];
      expect(least <= allowed, "leading_eigh: residual");
      expect(error >= least * (1 - rounded) - slack && error <= least / 0.7 + slack, "leading_eigh: errors");
      for (int64_t l = 0; l < k; ++l) {
        Real product = 0;
        for (int64_t i = 0; i < n; ++i) product += v[i * k + l] * bv[i];
        apart = std::max(apart, std::abs(product - (l == j)));
      }
    }
    expect(apart <= 2 * allowed, "leading_eigh: B-orthonormal");
    expect(std::abs(orthogonality[member] - apart) <= rounded * apart + slack, "leading_eigh: orthogonality");
  }
};

template <class T>
void test(int64_t batch, int64_t n) {
  const Pencils<T> pencils(batch, n, n % 2 == 0);
  std::vector<Reference> expected;
  for (int64_t member = 0; member < batch; ++member) expected.push_back(pencils.reference(member));
  for (int set = 0; set < kNumInstructionSets; ++set) {
    if (!kInstructionSets[set].supported()) continue;
    for (const int64_t k : {int64_t{1}, std::max<int64_t>(n / 4, 1), n}) {
      const Results<T> results(pencils, k, set);
      for (int64_t member = 0; member < batch; ++member) results.check(member, expected[member]);
    }
  }
}

// Faults, and a cluster at k, are not sound; their neighbours are.
template <class T>
void test_unsound(int64_t n, int64_t k, int set) {
  constexpr int64_t kWhole = 6;
  Pencils<T> pencils(kWhole + 1, n, false);
  pencils.a[pencils.at(0, n - 1, 0)] = static_cast<T>(kNaN);
  pencils.b[pencils.at(1, n - 1, n - 1)] = std::numeric_limits<T>::infinity();
  pencils.b[pencils.at(2, n - 1, n - 1)] = -1;
  pencils.b[pencils.at(3, 0, 0)] = 0;
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j <= i; ++j) {
      pencils.a[pencils.at(4, i, j)] = 0;
      pencils.a[pencils.at(5, i, j)] = i != j ? 0 : i < k + 1 ? 2 : 1;
      pencils.b[pencils.at(5, i, j)] = i == j;
    }
  }
  const Results<T> results(pencils, k, set);
  for (int64_t member = 0; member < kWhole; ++member) expect(results.sound[member] == 0, "leading_eigh: unsound");
  results.check(kWhole, pencils.reference(kWhole));
}

template <class T>
void test_type() {
  for (int64_t n = 1; n <= 40; ++n) test<T>(2, n);
  test<T>(5, 70);
  for (int set = 0; set < kNumInstructionSets; ++set) {
    if (kInstructionSets[set].supported()) test_unsound<T>(11, 3, set);
  }
}

}  // namespace

int main() {
  test_type<float>();
  test_type<double>();
  std::puts("leading_eigh tests passed");
}
