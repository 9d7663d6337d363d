#include "leading_eigh.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <new>

#include "row_blocks.h"
#include "tridiagonal.h"
#include "vector.h"

namespace sst {

namespace {

using namespace blocks;

// Entries beyond these may leave the range of float64 on the way.
constexpr double kLeast = 1e-50, kMost = 1e50;
constexpr int64_t kPowerSteps = 4;

// What a thread works in: matrices (n, stride) and blocks of vectors (n, width).
struct Workspace {
  int64_t n, k, stride, width;
  double *a, *b, *u, *c, *h, *y, *by, *inverse, *values, *factors;
  Tridiagonal t;
};

// Both triangles of a member; false if it is not finite or out of range.
template <class T>
SST_INLINE bool read(const Matrices<T>& from, int64_t member, int64_t n, double* to, int64_t stride) {
  const T* const x = from.data + member * from.batch;
  double most = 0, sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j <= i; ++j) {
      const double value = x[i * from.row + j * from.col];
      to[i * stride + j] = value;
      to[j * stride + i] = value;
      most = std::max(most, std::abs(value));
      sum += value - value;
    }
  }
  return sum == 0 && most >= kLeast && most <= kMost;
}

// ‖M‖₂ from below: power steps from the longest row. `x` and `y` hold n numbers and a vector more.
template <int Bytes>
SST_INLINE double norm(const double* m, int64_t n, int64_t stride, double* x, double* y) {
  using B = RowBlocks<Bytes, 1>;
  using V = typename B::V;
  const auto square = [&](const double* v) __attribute__((always_inline)) {
    V sum[2] = {};
    for (int64_t j = 0; j < n; j += B::kTile) {
      sum[0] += B::at(v + j) * B::at(v + j);
      sum[1] += B::at(v + j + B::kLanes) * B::at(v + j + B::kLanes);
    }
    double total = 0;
    for (int64_t lane = 0; lane < B::kLanes; ++lane) total += sum[0][lane] + sum[1][lane];
    return total;
  };
  double longest = 0;
  int64_t row = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double size = square(m + i * stride);
    if (size > longest) longest = size, row = i;
  }
  std::copy_n(m + row * stride, n, x);
  std::fill_n(x + n, B::kTile, 0.0);
  double size = std::sqrt(longest);
  for (int64_t step = 0; step < kPowerSteps; ++step) {
    for (int64_t i = 0; i < n; ++i) x[i] /= size;
    std::fill_n(y, n + B::kTile, 0.0);
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) {
      const double* const rows = m + i * stride;
      for (int64_t j = 0; j < n; j += B::kLanes) {
        B::at(y + j) += x[i] * B::at(rows + j) + x[i + 1] * B::at(rows + stride + j) +
                        x[i + 2] * B::at(rows + 2 * stride + j) + x[i + 3] * B::at(rows + 3 * stride + j);
      }
    }
    for (; i < n; ++i) {
      for (int64_t j = 0; j < n; j += B::kLanes) B::at(y + j) += x[i] * B::at(m + i * stride + j);
    }
    std::swap(x, y);
    size = std::sqrt(square(x));
  }
  return size;
}

// C = U⁻ᵀ A U⁻¹: its upper triangle, and whole blocks on the diagonal; false if its squares would leave the range.
template <int Bytes, int Rows>
SST_INLINE bool reduce(const Workspace& s) {
  using B = RowBlocks<Bytes, Rows>;
  std::copy_n(s.a, s.n * s.stride, s.h);
  B::solve_left(s.u, s.inverse, s.n, s.stride, s.h, false);
  for (int64_t i0 = 0; i0 < s.n; i0 += 16) {
    for (int64_t j = 0; j < std::min(i0 + 16, s.n); ++j) {
      for (int64_t i = i0; i < std::min(i0 + 16, s.n); ++i) s.c[j * s.stride + i] = s.h[i * s.stride + j];
    }
  }
  B::solve_left(s.u, s.inverse, s.n, s.stride, s.c, true);
  double most = 0, sum = 0;
  for (int64_t i = 0; i < s.n; ++i) {
    double* const row = s.c + i * s.stride;
    for (int64_t j = i / B::kLanes * B::kLanes; j < i; ++j) row[j] = s.c[j * s.stride + i];
    for (int64_t j = i; j < s.n; ++j) sum += row[j] - row[j];
    for (int64_t j = i; j < s.n; ++j) most = std::max(most, std::abs(row[j]));
  }
  return sum == 0 && most >= kLeast * kLeast && most <= kMost * kMost;
}

// Backward errors and orthogonality of the vectors in y; whether they are small.
template <int Bytes, int Rows, class T>
SST_INLINE bool certify(const Workspace& s, const LeadingEigh<T>& args, int64_t member) {
  using B = RowBlocks<Bytes, Rows>;
  using V = typename B::V;
  const double norm_a = norm<Bytes>(s.a, s.n, s.stride, s.t.p, s.t.w);
  const double norm_b = norm<Bytes>(s.b, s.n, s.stride, s.t.p, s.t.w);
  const double most_apart = std::min(1.0 / double(s.k), 10 * double(s.n) * std::numeric_limits<T>::epsilon());
  double apart = 0;
  bool good = true;  // NaN is not
  for (int64_t first = 0; first < s.width; first += B::kTile) {
    double* const y = s.y + first;
    V squares[2] = {}, residuals[2] = {};
    double values[B::kTile];
    for (int64_t i = 0; i < B::kTile; ++i) values[i] = s.values[std::min(first + i, s.k - 1)];
    B::down(s.n, [&]<int R>(int64_t i) __attribute__((always_inline)) {
      V a[R][2] = {}, b[R][2] = {};
      B::template add_products<R>(a, 0, s.n, y, s.width, [&](int64_t p, int r) __attribute__((always_inline)) {
        return s.a[(i + r) * s.stride + p];
      });
      B::template add_products<R>(b, 0, s.n, y, s.width, [&](int64_t p, int r) __attribute__((always_inline)) {
        return s.b[(i + r) * s.stride + p];
      });
      for (int r = 0; r < R; ++r) {
        for (int64_t v = 0; v < 2; ++v) {
          const V x = B::at(y + (i + r) * s.width + v * B::kLanes),
                  residual = a[r][v] - B::at(values + v * B::kLanes) * b[r][v];
          B::at(s.by + (i + r) * B::kTile + v * B::kLanes) = b[r][v];
          squares[v] += x * x;
          residuals[v] += residual * residual;
        }
      }
    });
    const int64_t count = std::min(s.k - first, B::kTile);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t v = i / B::kLanes, lane = i % B::kLanes;
      const double size = norm_a + std::abs(s.values[first + i]) * norm_b;
      const double error = std::sqrt(residuals[v][lane] / squares[v][lane]) / size;
      args.errors[member * s.k + first + i] = static_cast<T>(error);
      good &= error <= args.tol;
    }
    B::down(std::min(s.k, first + B::kTile), [&]<int R>(int64_t c) __attribute__((always_inline)) {
      V gram[R][2] = {};
      B::template add_products<R>(gram, 0, s.n, s.by, B::kTile, [&](int64_t p, int r) __attribute__((always_inline)) {
        return s.y[p * s.width + c + r];
      });
      for (int r = 0; r < R; ++r) {
        for (int64_t i = 0; i < count; ++i) {
          const double off = std::abs(gram[r][i / B::kLanes][i % B::kLanes] - (c + r == first + i));
          apart = std::max(apart, off);
          good &= off < most_apart;
        }
      }
    });
  }
  args.orthogonality[member] = static_cast<T>(apart);
  return good;
}

template <int Bytes, int Rows, class T>
SST_INLINE bool solve(Workspace& s, const LeadingEigh<T>& args, int64_t member) {
  using B = RowBlocks<Bytes, Rows>;
  const int64_t n = s.n, k = s.k, m = std::min(k + 1, n);
  if (!read(args.a, member, n, s.a, s.stride) || !read(args.b, member, n, s.b, s.stride)) return false;
  std::copy_n(s.b, n * s.stride, s.u);
  if (!B::factor(s.u, s.inverse, n, s.stride)) return false;
  if (!reduce<Bytes, Rows>(s)) return false;
  tridiagonalise<Bytes>(s.t, s.c, s.h, s.stride);
  bisect<Bytes>(s.t, m, s.values);
  inverse_iteration<Bytes>(s.t, s.values, k, s.y, s.width, s.factors);
  for (int64_t j = 0; j < s.width; j += B::kTile) {
    apply_q<Bytes>(s.t, s.h, s.stride, s.y + j, s.width);
    B::up(n, [&]<int R>(int64_t i) __attribute__((always_inline)) {
      B::template backward<R>(s.u, s.inverse, n, s.stride, s.y + j, s.width, i);
    });
  }
  T* const values = args.values + member * m;
  for (int64_t i = 0; i < m; ++i) s.values[i] = values[i] = static_cast<T>(s.values[i]);
  T* const vectors = args.vectors + member * n * k;
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < k; ++j) {
      double& x = s.y[i * s.width + j];
      x = vectors[i * k + j] = static_cast<T>(x);
      sum += x - x;
    }
  }
  const bool gap = m == k || s.values[k - 1] - s.values[k] > double(n) * std::numeric_limits<T>::epsilon() * s.t.norm;
  return sum == 0 && gap && certify<Bytes, Rows>(s, args, member);
}

template <int Bytes, int Rows, class T>
SST_INLINE void solve_members(const LeadingEigh<T>& args, std::atomic<int64_t>& next) {
  constexpr int64_t lanes = Bytes / sizeof(double), tile = 2 * lanes, line = 8, rest = 32;
  const int64_t n = args.n;
  Workspace s;
  s.n = s.t.n = n, s.k = args.k;
  s.width = (args.k + tile - 1) / tile * tile;
  s.stride = ((n + 15) / 16 * 2 + 1) * line;  // an odd number of cache lines, lest a column meets in one set
  const int64_t vector = (n + rest + line - 1) / line * line;
  const int64_t count = 5 * n * s.stride + rest + n * (s.width + tile) + 9 * vector + 5 * n * lanes;
  struct Free {
    void operator()(double* p) const { ::operator delete(p, std::align_val_t{64}); }
  };
  const std::unique_ptr<double, Free> memory(
      static_cast<double*>(::operator new(static_cast<size_t>(count) * sizeof(double), std::align_val_t{64})));
  double* at = memory.get();
  std::fill_n(at, count, 0.0);
  for (double** part : {&s.a, &s.b, &s.u, &s.c, &s.h}) *part = at, at += n * s.stride;
  at += rest;  // what a tile reads beyond the last row
  s.y = at, at += n * s.width;
  s.by = at, at += n * tile;
  for (double** part : {&s.inverse, &s.values, &s.t.d, &s.t.e, &s.t.tau, &s.t.u, &s.t.w, &s.t.p, &s.t.y}) {
    *part = at, at += vector;
  }
  s.factors = at;
  for (int64_t member = next++; member < args.batch; member = next++) {
    args.sound[member] = solve<Bytes, Rows>(s, args, member);
  }
}

}  // namespace

template <class T>
void leading_eigh_cpu(int set, const LeadingEigh<T>& args, std::atomic<int64_t>& next) {
  by_set(set, [&]<int Bytes, int Rows>() __attribute__((always_inline)) { solve_members<Bytes, Rows>(args, next); });
}

template void leading_eigh_cpu(int, const LeadingEigh<float>&, std::atomic<int64_t>&);
template void leading_eigh_cpu(int, const LeadingEigh<double>&, std::atomic<int64_t>&);

}  // namespace sst
