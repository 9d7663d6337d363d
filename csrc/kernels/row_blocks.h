// Factor, congruence and products of one matrix, rows a few at a time and two vectors wide; for leading_eigh.
// Matrices are row-major, rows `stride` apart, columns beyond the last one 0 and no more than two vectors of them read.
#pragma once

#include <cmath>
#include <cstdint>

#include "lane_group.h"
#include "vector.h"

namespace sst::blocks {

// A body for W rows of registers: Bytes to a vector, Rows rows at once.
template <int Bytes, int Rows>
struct RowBlocks {
  using V = Vector<Bytes, double>;
  static constexpr int64_t kLanes = Bytes / sizeof(double), kTile = 2 * kLanes;

  SST_INLINE static V& at(double* x) { return *reinterpret_cast<V*>(x); }
  SST_INLINE static const V& at(const double* x) { return *reinterpret_cast<const V*>(x); }

  // Calls f.operator()<r>(i) for blocks of r rows from i that cover [0, n), downwards or upwards.
  template <class F>
  SST_INLINE static void down(int64_t n, const F& f) {
    int64_t i = 0;
    for (; i + Rows <= n; i += Rows) f.template operator()<Rows>(i);
    for (; i < n; ++i) f.template operator()<1>(i);
  }
  template <class F>
  SST_INLINE static void up(int64_t n, const F& f) {
    int64_t i = n;
    for (; i >= Rows; i -= Rows) f.template operator()<Rows>(i - Rows);
    for (; i > 0; --i) f.template operator()<1>(i - 1);
  }

  // sum += Σ_p f(p, r) x_p for r < R, p in [first, last).
  template <int R, class F>
  SST_INLINE static void add_products(V (&sum)[R][2], int64_t first, int64_t last, const double* x, int64_t stride,
                                      const F& f) {
    for (int64_t p = first; p < last; ++p) {
      const V x0 = at(x + p * stride), x1 = at(x + p * stride + kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const double factor = f(p, r);
        sum[r][0] += factor * x0;
        sum[r][1] += factor * x1;
      }
    }
  }

  // Rows [i, i + R) of a tile of X become those of U⁻ᵀX, the rows above being so already.
  template <int R>
  SST_INLINE static void forward(const double* u, const double* inverse, int64_t stride, double* x, int64_t i) {
    V sum[R][2] = {};
    add_products<R>(sum, 0, i, x, stride,
                    [&](int64_t p, int r) __attribute__((always_inline)) { return u[p * stride + i + r]; });
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      double* const row = x + (i + r) * stride;
      V y0 = at(row) - sum[r][0], y1 = at(row + kLanes) - sum[r][1];
      y0 *= inverse[i + r], y1 *= inverse[i + r];
      at(row) = y0, at(row + kLanes) = y1;
#pragma GCC unroll 8
      for (int s = r + 1; s < R; ++s) {
        const double factor = u[(i + r) * stride + i + s];
        sum[s][0] += factor * y0;
        sum[s][1] += factor * y1;
      }
    }
  }

  // Rows [i, i + R) of a tile of Y become those of U⁻¹Y, the rows below being so already.
  template <int R>
  SST_INLINE static void backward(const double* u, const double* inverse, int64_t n, int64_t stride, double* y,
                                  int64_t width, int64_t i) {
    V sum[R][2] = {};
    add_products<R>(sum, i + R, n, y, width,
                    [&](int64_t p, int r) __attribute__((always_inline)) { return u[(i + r) * stride + p]; });
#pragma GCC unroll 8
    for (int r = R - 1; r >= 0; --r) {
      double* const row = y + (i + r) * width;
      V y0 = at(row) - sum[r][0], y1 = at(row + kLanes) - sum[r][1];
      y0 *= inverse[i + r], y1 *= inverse[i + r];
      at(row) = y0, at(row + kLanes) = y1;
#pragma GCC unroll 8
      for (int s = 0; s < r; ++s) {
        const double factor = u[(i + s) * stride + i + r];
        sum[s][0] += factor * y0;
        sum[s][1] += factor * y1;
      }
    }
  }

  // Rows [i, i + R) of U, in place of those of B; false where a pivot is not positive.
  template <int R>
  SST_INLINE static bool factor_rows(double* u, double* inverse, int64_t n, int64_t stride, int64_t i) {
    V sum[R][2] = {};
    add_products<R>(sum, 0, i, u + i, stride,
                    [&](int64_t p, int r) __attribute__((always_inline)) { return u[p * stride + i + r]; });
    for (int r = 0; r < R; ++r) {
      double* const row = u + (i + r) * stride + i;
      const double* const gone = reinterpret_cast<const double*>(&sum[r]);
      for (int s = r; s < R; ++s) {
        double x = row[s] - gone[s];
        for (int q = 0; q < r; ++q) x -= u[(i + q) * stride + i + r] * u[(i + q) * stride + i + s];
        if (s == r) {
          if (!(x > 0)) return false;
          row[r] = std::sqrt(x);
          inverse[i + r] = 1 / row[r];
        } else {
          row[s] = x * inverse[i + r];
        }
      }
    }
    for (int64_t j = i + R; j < n; j += kTile) forward<R>(u, inverse, stride, u + j, i);
    return true;
  }

  // B = UᵀU in the upper triangle, the lower one left as it was, and 1 / U_jj; false if B is not positive definite.
  SST_INLINE static bool factor(double* u, double* inverse, int64_t n, int64_t stride) {
    bool positive = true;
    down(n, [&]<int R>(int64_t i)
                __attribute__((always_inline)) { positive = positive && factor_rows<R>(u, inverse, n, stride, i); });
    return positive;
  }

  // X = U⁻ᵀX; if `upper`, only its upper triangle, from that of X.
  SST_INLINE static void solve_left(const double* u, const double* inverse, int64_t n, int64_t stride, double* x,
                                    bool upper) {
    for (int64_t j = 0; j < n; j += kTile) {
      const int64_t rows = upper && j + kTile < n ? j + kTile : n;
      down(rows, [&]<int R>(int64_t i) __attribute__((always_inline)) { forward<R>(u, inverse, stride, x + j, i); });
    }
  }
};

}  // namespace sst::blocks
