// A symmetric matrix's tridiagonal form, and the largest pairs of that; for leading_eigh.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "row_blocks.h"

namespace sst::blocks {

// T with diagonal d and off-diagonal e, and the vectors that working on it takes; all n + 16 long, zeros at the end.
struct Tridiagonal {
  int64_t n;
  double *d, *e, *tau;    // e[i] = T(i, i + 1); scale of reflector i
  double *u, *w, *p, *y;  // reflector, its update; the next ones
  double norm;            // max_i |d_i| + |e_(i−1)| + |e_i| >= ‖T‖₂
};

// Rows [i, i + R), in one block of W: C −= p wᵀ + w pᵀ there, then y += C u. Blocks on the diagonal are whole; of
// the others only those above it exist.
template <int Bytes, int R>
SST_INLINE void update_and_multiply(const Tridiagonal& t, double* c, int64_t stride, int64_t i) {
  using B = RowBlocks<Bytes, R>;
  using V = typename B::V;
  constexpr int64_t lanes = B::kLanes;
  const int64_t corner = i / lanes * lanes;
  V dot[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    V& x = B::at(c + (i + r) * stride + corner);
    x -= t.p[i + r] * B::at(t.w + corner) + t.w[i + r] * B::at(t.p + corner);
    dot[r] = x * B::at(t.u + corner);
  }
  for (int64_t j = corner + lanes; j < t.n; j += lanes) {
    const V p = B::at(t.p + j), w = B::at(t.w + j), u = B::at(t.u + j);
    V y = B::at(t.y + j);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      V& at = B::at(c + (i + r) * stride + j);
      const V x = at - t.p[i + r] * w - t.w[i + r] * p;
      at = x;
      dot[r] += x * u;
      y += t.u[i + r] * x;
    }
    B::at(t.y + j) = y;
  }
  for (int r = 0; r < R; ++r) {
    double sum = 0;
    for (int64_t lane = 0; lane < lanes; ++lane) sum += dot[r][lane];
    t.y[i + r] += sum;
  }
}

// T of C (blocks of W rows and columns: those on and above the diagonal), destroyed; reflector j, from column j + 1 on,
// into row j of h. Householder's method with the rank-two update of one step and the product of the next in one pass.
template <int Bytes>
SST_INLINE void tridiagonalise(Tridiagonal& t, double* c, double* h, int64_t stride) {
  constexpr int64_t lanes = Bytes / sizeof(double), group = lanes < 4 ? lanes : 4;
  const int64_t n = t.n;
  std::fill_n(t.p, n, 0.0);
  std::fill_n(t.w, n, 0.0);
  std::fill_n(t.u, n, 0.0);
  for (int64_t j = 0; j < n; ++j) {
    double* const row = c + j * stride;
    double tail = 0;
    for (int64_t i = j; i < n; ++i) row[i] -= t.p[j] * t.w[i] + t.w[j] * t.p[i];
    for (int64_t i = j + 2; i < n; ++i) tail += row[i] * row[i];
    t.d[j] = row[j];
    if (j + 1 == n) break;
    const double alpha = row[j + 1];
    t.e[j] = alpha, t.tau[j] = 0;
    t.u[j] = 0;
    std::fill(t.u + j + 1, t.u + n, 0.0);
    if (tail > 0) {
      t.e[j] = -std::copysign(std::sqrt(alpha * alpha + tail), alpha);
      t.tau[j] = (t.e[j] - alpha) / t.e[j];
      const double scale = 1 / (alpha - t.e[j]);
      for (int64_t i = j + 2; i < n; ++i) t.u[i] = row[i] * scale;
      t.u[j + 1] = 1;
    }
    std::copy_n(t.u + j + 1, n - j - 1, h + j * stride + j + 1);
    std::fill(t.y + j, t.y + n, 0.0);
    int64_t i = j + 1;
    for (; i < n && i % group != 0; ++i) update_and_multiply<Bytes, 1>(t, c, stride, i);
    for (; i + group <= n; i += group) update_and_multiply<Bytes, group>(t, c, stride, i);
    for (; i < n; ++i) update_and_multiply<Bytes, 1>(t, c, stride, i);
    double product = 0;
    for (i = j + 1; i < n; ++i) product += t.y[i] * t.u[i];
    const double shift = 0.5 * t.tau[j] * product;  // w = τ(y − ½τ(yᵀu)u)
    t.p[j] = t.w[j] = 0;
    for (i = j + 1; i < n; ++i) {
      t.w[i] = t.tau[j] * (t.y[i] - shift * t.u[i]);
      t.p[i] = t.u[i];
    }
  }
}

// Largest m eigenvalues of T, descending, each to eps ‖T‖, by as many points at once as four vectors hold.
template <int Bytes>
SST_INLINE void bisect(Tridiagonal& t, int64_t m, double* values) {
  using V = typename RowBlocks<Bytes, 1>::V;
  using I = Vector<Bytes, int64_t>;
  constexpr int64_t lanes = Bytes / sizeof(double), points = 4 * lanes;
  const int64_t n = t.n;
  t.norm = 0;
  double* const squares = t.y;
  for (int64_t i = 0; i < n; ++i) {
    const double left = i > 0 ? std::abs(t.e[i - 1]) : 0, right = i + 1 < n ? std::abs(t.e[i]) : 0;
    t.norm = std::max(t.norm, std::abs(t.d[i]) + left + right);
    squares[i] = left * left;
  }
  const double least = std::max(t.norm * t.norm * 1e-290, 1e-300);  // no quotient is 0 / 0
  for (int64_t i = 0; i < n; ++i) squares[i] = std::max(squares[i], least);
  const int64_t each = std::max<int64_t>(1, points / m), at_once = points / each;
  for (int64_t first = 0; first < m; first += at_once) {
    const int64_t count = std::min(at_once, m - first);
    double low[points], high[points];
    std::fill_n(low, count, -t.norm * (1 + 1e-14));
    std::fill_n(high, count, first > 0 ? values[first - 1] + t.norm * lanes::kEps : t.norm * (1 + 1e-14));
    for (double width = 2 * t.norm; width > 0.5 * lanes::kEps * t.norm; width /= double(each + 1)) {
      alignas(64) double x[points];
      for (int64_t i = 0; i < points; ++i) {
        const int64_t of = std::min(i / each, count - 1);
        x[i] = low[of] + (high[of] - low[of]) * double(i % each + 1) / double(each + 1);
      }
      V q[4];
      I above[4] = {};
      for (int v = 0; v < 4; ++v) q[v] = V{} + 1;
      for (int64_t i = 0; i < n; ++i) {
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) {  // pivots of T − x I: as many are positive as eigenvalues lie above x
          const V quotient = (i == 0 ? 0.0 : squares[i]) / q[v];
          q[v] = t.d[i] - RowBlocks<Bytes, 1>::at(x + v * lanes) - quotient;
          above[v] -= q[v] > 0;
        }
      }
      for (int64_t of = 0; of < count; ++of) {
        const double start = low[of], end = high[of];
        for (int64_t s = 0; s < each; ++s) {
          const int64_t i = of * each + s;
          const bool beyond = above[i / lanes][i % lanes] <= first + of;
          if (beyond) {
            high[of] = std::min(x[i], end);
            break;
          }
          low[of] = std::max(x[i], start);
        }
      }
    }
    for (int64_t of = 0; of < count; ++of) values[first + of] = 0.5 * (low[of] + high[of]);
  }
}

// Factors of T − λI, a lane for each λ: partial pivoting (Wilkinson 1965). n of each.
template <int Bytes>
struct ShiftedFactors {
  using V = Vector<Bytes, double>;
  using I = Vector<Bytes, int64_t>;
  V *pivot, *next, *second, *factor;
  I* swapped;
};

template <int Bytes>
SST_INLINE void factor_shifted(const Tridiagonal& t, Vector<Bytes, double> shift, const ShiftedFactors<Bytes>& f) {
  using V = Vector<Bytes, double>;
  using I = Vector<Bytes, int64_t>;
  const auto absolute = [](V x) __attribute__((always_inline)) { return x < 0 ? -x : x; };
  const double least = std::max(lanes::kEps * t.norm, 1e-300);
  const auto away = [&](V x) __attribute__((always_inline)) {
    return absolute(x) < least ? (x < 0 ? V{} - least : V{} + least) : x;
  };
  V p = t.d[0] - shift, q = V{} + t.e[0];
  for (int64_t i = 0; i + 1 < t.n; ++i) {
    const V below = V{} + t.e[i], diagonal = t.d[i + 1] - shift, beyond = V{} + (i + 2 < t.n ? t.e[i + 1] : 0.0);
    const I swap = absolute(p) < absolute(below);
    const V pivot = away(swap ? below : p);
    const V factor = (swap ? p : below) / pivot;
    f.swapped[i] = swap;
    f.pivot[i] = 1 / pivot;
    f.next[i] = swap ? diagonal : q;
    f.second[i] = swap ? beyond : V{};
    f.factor[i] = factor;
    p = swap ? q - factor * diagonal : diagonal - factor * q;
    q = swap ? -factor * beyond : beyond;
  }
  f.pivot[t.n - 1] = 1 / away(p);
}

// y, a vector in each lane, `width` numbers apart: (T − λI)⁻¹ y; without `lower`, the upper factor alone.
template <int Bytes>
SST_INLINE void solve_shifted(int64_t n, const ShiftedFactors<Bytes>& f, double* y, int64_t width, bool lower) {
  using B = RowBlocks<Bytes, 1>;
  using V = typename B::V;
  if (lower) {
    V x = B::at(y);
    for (int64_t i = 0; i + 1 < n; ++i) {
      const V below = B::at(y + (i + 1) * width);
      B::at(y + i * width) = f.swapped[i] ? below : x;
      x = f.swapped[i] ? x - f.factor[i] * below : below - f.factor[i] * x;
    }
    B::at(y + (n - 1) * width) = x;
  }
  V one = {}, two = {};
  for (int64_t i = n - 1; i >= 0; --i) {
    V x = B::at(y + i * width);
    if (i + 1 < n) x -= f.next[i] * one;
    if (i + 2 < n) x -= f.second[i] * two;
    x *= f.pivot[i];
    B::at(y + i * width) = x;
    two = one, one = x;
  }
}

// Columns [first, first + lanes) of y orthogonal to all from `before` on and to each other, of length 1; zero from k
// on.
template <int Bytes>
SST_INLINE void orthonormalise(int64_t n, int64_t k, double* y, int64_t width, int64_t first, int64_t before) {
  using B = RowBlocks<Bytes, 1>;
  using V = typename B::V;
  constexpr int64_t lanes = B::kLanes;
  V most = {};  // lengths near 1 first, lest squares overflow
  for (int64_t i = 0; i < n; ++i) {
    const V x = B::at(y + i * width + first), size = x < 0 ? -x : x;
    most = size > most ? size : most;
  }
  V scale = {};
  for (int64_t lane = 0; lane < lanes && first + lane < k; ++lane) scale[lane] = 1 / most[lane];
  for (int64_t i = 0; i < n; ++i) B::at(y + i * width + first) *= scale;
  // The parts along `Columns` columns from c, of the lanes with 1 in `wanted`.
  const auto project = [&]<int Columns>(int64_t c, V wanted) __attribute__((always_inline)) {
    V sum[Columns] = {};
    for (int64_t i = 0; i < n; ++i) {
      const V x = B::at(y + i * width + first);
#pragma GCC unroll 8
      for (int s = 0; s < Columns; ++s) sum[s] += y[i * width + c + s] * x;
    }
    for (int s = 0; s < Columns; ++s) sum[s] *= wanted;
    for (int64_t i = 0; i < n; ++i) {
      V x = B::at(y + i * width + first);
#pragma GCC unroll 8
      for (int s = 0; s < Columns; ++s) x -= y[i * width + c + s] * sum[s];
      B::at(y + i * width + first) = x;
    }
  };
  constexpr int64_t together = 8;  // columns
  int64_t c = before;
  for (; c + together <= first; c += together) project.template operator()<together>(c, V{} + 1);
  for (; c < first; ++c) project.template operator()<1>(c, V{} + 1);
  for (int64_t lane = 0; lane < lanes && first + lane < k; ++lane) {
    double* const column = y + first + lane;
    double square = 0;
    for (int64_t i = 0; i < n; ++i) square += column[i * width] * column[i * width];
    const double factor = 1 / std::sqrt(square);
    for (int64_t i = 0; i < n; ++i) column[i * width] *= factor;
    V later = {};
    for (int64_t other = lane + 1; other < lanes; ++other) later[other] = 1;
    if (lane + 1 < lanes && first + lane + 1 < k) project.template operator()<1>(first + lane, later);
  }
}

// Eigenvectors of T for its k largest eigenvalues, columns of y (n, width).
template <int Bytes>
SST_INLINE void inverse_iteration(const Tridiagonal& t, const double* values, int64_t k, double* y, int64_t width,
                                  double* work) {
  using V = typename RowBlocks<Bytes, 1>::V;
  using I = Vector<Bytes, int64_t>;
  constexpr int64_t lanes = Bytes / sizeof(double), solves = 3;
  const int64_t n = t.n;
  const auto part = [&](int64_t i) { return reinterpret_cast<V*>(work + i * n * lanes); };
  const ShiftedFactors<Bytes> f{part(0), part(1), part(2), part(3), reinterpret_cast<I*>(part(4))};
  uint64_t state = 88172645463325252u;
  for (int64_t first = 0; first < k; first += lanes) {
    V shift = {};
    for (int64_t lane = 0; lane < lanes; ++lane) shift[lane] = values[std::min(first + lane, k - 1)];
    factor_shifted<Bytes>(t, shift, f);
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t lane = 0; lane < lanes; ++lane) {  // Marsaglia (2003), xorshift
        state ^= state << 13, state ^= state >> 7, state ^= state << 17;
        y[i * width + first + lane] = static_cast<double>(static_cast<int64_t>(state)) * 0x1p-63;
      }
    }
    for (int64_t s = 0; s < solves; ++s) {
      solve_shifted<Bytes>(n, f, y + first, width, s > 0);
      orthonormalise<Bytes>(n, k, y, width, first, s > 0 ? 0 : first);
    }
    orthonormalise<Bytes>(n, k, y, width, first, 0);  // twice is enough
  }
}

// Y = Q Y, Q the product of tridiagonalise's reflectors, for a tile of columns.
template <int Bytes>
SST_INLINE void apply_q(const Tridiagonal& t, const double* h, int64_t stride, double* y, int64_t width) {
  using B = RowBlocks<Bytes, 1>;
  using V = typename B::V;
  for (int64_t j = t.n - 2; j >= 0; --j) {
    const double* const u = h + j * stride;
    V sum[2][2] = {};
    int64_t i = j + 1;
    for (; i + 2 <= t.n; i += 2) {
#pragma GCC unroll 2
      for (int s = 0; s < 2; ++s) {
        sum[s][0] += u[i + s] * B::at(y + (i + s) * width);
        sum[s][1] += u[i + s] * B::at(y + (i + s) * width + B::kLanes);
      }
    }
    if (i < t.n) {
      sum[0][0] += u[i] * B::at(y + i * width);
      sum[0][1] += u[i] * B::at(y + i * width + B::kLanes);
    }
    const V s0 = t.tau[j] * (sum[0][0] + sum[1][0]), s1 = t.tau[j] * (sum[0][1] + sum[1][1]);
    for (i = j + 1; i < t.n; ++i) {
      B::at(y + i * width) -= u[i] * s0;
      B::at(y + i * width + B::kLanes) -= u[i] * s1;
    }
  }
}

}  // namespace sst::blocks
