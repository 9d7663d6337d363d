// What the CPU kernel of fused_eigh.h does to a group of pencils, one to a lane of a vector, up to the standard
// problem: factors and congruences.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "schedule.h"

// Inlined into functions of several targets, each compiled for its instruction set (vector.h).
#define SST_INLINE [[gnu::always_inline]] inline

namespace sst::lanes {

constexpr double kEps = std::numeric_limits<double>::epsilon();
constexpr int64_t kTile = 4;     // sums of kTile × kTile elements stay in registers
constexpr int64_t kWaiting = 4;  // steps of QL whose rotations are applied at once

template <class V>
SST_INLINE V root(V x) {
#ifdef __x86_64__  // in assembler for the reason given in panel.cpp
  if constexpr (sizeof(V) > 16) {
    asm("vsqrtpd %1, %0" : "=v"(x) : "v"(x));
  } else {
    asm("sqrtpd %1, %0" : "=x"(x) : "x"(x));
  }
#else
  for (unsigned i = 0; i < sizeof(V) / sizeof(double); ++i) x[i] = std::sqrt(x[i]);
#endif
  return x;
}

// Aligned, unlike vector.h's; accesses to elements may alias it, as they may an array.
template <int Bytes, class A>
using Lanes __attribute__((vector_size(Bytes))) = A;

// What one thread works on: a group of pencils, one to a lane. V holds a number, I an integer or a mask, of each.
template <int Bytes>
struct Group {
  using V = Lanes<Bytes, double>;
  using I = Lanes<Bytes, int64_t>;
  static constexpr int64_t kLanes = Bytes / sizeof(double);

  int64_t n, stride;              // elements of a row; an odd number, lest a column meets in one set of the cache
  V *l, *c, *z;                   // matrices: L; A, then C, then reflectors; eigenvectors, one to a row
  V *inverse, *d, *e, *w;         // 1 / L_jj; diagonal and subdiagonal of T; a vector
  V* turns;                       // rotations to be applied: cosine and sine for rows i and i + 1, n of them a step
  Range sweeps[kWaiting];         // from which row to which each of the steps turns
  int64_t waiting;                // steps
  I bad, indefinite, unfinished;  // masks

  SST_INLINE static V absolute(V x) { return x < 0 ? -x : x; }
  SST_INLINE static V full(double x) { return V{} + x; }
  SST_INLINE static bool any(I mask) {
    int64_t bits = 0;
    for (int64_t i = 0; i < kLanes; ++i) bits |= mask[i];
    return bits != 0;
  }
};

// Element (i, j) of a matrix seen along any two strides.
template <class V>
struct View {
  V* data;
  int64_t row, col;
  SST_INLINE V& operator()(int64_t i, int64_t j) const { return data[i * row + j * col]; }
};

// sum_rc = Σ_{k < count} x_(i + r)k l_(j + c)k; rows from n on repeat the last.
template <class V>
SST_INLINE void tile_sums(V (&sum)[kTile][kTile], View<V> x, int64_t i, View<V> l, int64_t j, int64_t n,
                          int64_t count) {
  const V *p[kTile], *q[kTile];
  for (int64_t r = 0; r < kTile; ++r) {
    p[r] = &x(std::min(i + r, n - 1), 0);
    q[r] = &l(std::min(j + r, n - 1), 0);
  }
  const int64_t p_step = x.col, q_step = l.col;
  for (int64_t k = 0; k < count; ++k) {
    V pk[kTile];
#pragma GCC unroll 4
    for (int64_t r = 0; r < kTile; ++r) pk[r] = p[r][k * p_step];
#pragma GCC unroll 4
    for (int64_t c = 0; c < kTile; ++c) {
      const V qk = q[c][k * q_step];
#pragma GCC unroll 4
      for (int64_t r = 0; r < kTile; ++r) sum[r][c] += pk[r] * qk;
    }
  }
}

// Solves X Lᵀ = F from left to right: x_ij = (f_ij - Σ_{k < j} x_ik l_jk) / l_jj. F and X may be one matrix. `lower`: X
// is symmetric, and only its elements j <= i are wanted and written.
template <bool lower, class V>
SST_INLINE void solve_rows(View<V> f, View<V> x, View<V> l, const V* inverse, int64_t inverse_step, int64_t n) {
  for (int64_t i0 = 0; i0 < n; i0 += kTile) {
    const int64_t end = lower ? std::min(i0 + kTile, n) : n;
    for (int64_t j0 = 0; j0 < end; j0 += kTile) {
      V sum[kTile][kTile] = {};
      tile_sums(sum, x, i0, l, j0, n, j0);
      for (int64_t c = 0; c < kTile && j0 + c < n; ++c) {
        const int64_t j = j0 + c;
        for (int64_t r = 0; r < kTile && i0 + r < n; ++r) {
          const int64_t i = i0 + r;
          if (lower && j > i) continue;
          V value = f(i, j) - sum[r][c];
          for (int64_t k = j0; k < j; ++k) value -= x(i, k) * l(j, k);
          x(i, j) = value * inverse[j * inverse_step];
        }
      }
    }
  }
}

// B = L Lᵀ, L over B's lower triangle. A pivot that is not positive makes its lane indefinite and becomes 1.
template <class G>
SST_INLINE void factor(G& g) {
  using V = typename G::V;
  const View<V> l{g.l, g.stride, 1};
  for (int64_t i0 = 0; i0 < g.n; i0 += kTile) {
    for (int64_t j0 = 0; j0 <= i0; j0 += kTile) {
      V sum[kTile][kTile] = {};
      tile_sums(sum, l, i0, l, j0, g.n, j0);
      for (int64_t c = 0; c < kTile && j0 + c < g.n; ++c) {
        const int64_t j = j0 + c;
        for (int64_t r = 0; r < kTile && i0 + r < g.n; ++r) {
          const int64_t i = i0 + r;
          if (j > i) continue;
          V value = l(i, j) - sum[r][c];
          for (int64_t k = j0; k < j; ++k) value -= l(i, k) * l(j, k);
          if (i == j) {
            const auto positive = (value > 0) & (value <= std::numeric_limits<double>::max());
            g.indefinite |= ~positive;
            value = root(positive ? value : G::full(1));
            g.inverse[j] = 1 / value;
            l(i, j) = value;
          } else {
            l(i, j) = value * g.inverse[j];
          }
        }
      }
    }
  }
}

// C = L⁻¹ A L⁻ᵀ: X = A L⁻ᵀ, then C = L⁻¹ X as C Lᵀ = Xᵀ, over X's lower triangle.
template <class G>
SST_INLINE void reduce(G& g) {
  using V = typename G::V;
  const View<V> c{g.c, g.stride, 1}, mirrored{g.c, 1, g.stride}, l{g.l, g.stride, 1};
  solve_rows<false>(c, c, l, g.inverse, 1, g.n);
  solve_rows<true>(mirrored, c, l, g.inverse, 1, g.n);
}

// p = C v for the leading k × k part of C, from its lower triangle.
template <class V>
SST_INLINE void multiply(View<V> c, int64_t k, const V* v, V* p) {
  int64_t i = 0;
  for (; i + kTile <= k; i += kTile) {
    V sum[kTile] = {};
    for (int64_t j = 0; j < i; ++j) {
      V pj = p[j];
#pragma GCC unroll 4
      for (int64_t r = 0; r < kTile; ++r) {
        const V a = c(i + r, j);
        sum[r] += a * v[j];
        pj += a * v[i + r];
      }
      p[j] = pj;
    }
#pragma GCC unroll 4
    for (int64_t r = 0; r < kTile; ++r) {
#pragma GCC unroll 4
      for (int64_t s = 0; s < kTile; ++s) sum[r] += c(i + std::max(r, s), i + std::min(r, s)) * v[i + s];
      p[i + r] = sum[r];
    }
  }
  for (; i < k; ++i) {
    V sum = c(i, i) * v[i];
    for (int64_t j = 0; j < i; ++j) {
      sum += c(i, j) * v[j];
      p[j] += c(i, j) * v[i];
    }
    p[i] = sum;
  }
}

// C -= v wᵀ + w vᵀ in the lower triangle of the leading k × k part.
template <class V>
SST_INLINE void update(View<V> c, int64_t k, const V* v, const V* w) {
  int64_t i = 0;
  for (; i + kTile <= k; i += kTile) {
    for (int64_t j = 0; j < i + kTile; ++j) {  // beyond the diagonal too, where nothing is read
#pragma GCC unroll 4
      for (int64_t r = 0; r < kTile; ++r) c(i + r, j) -= v[i + r] * w[j] + w[i + r] * v[j];
    }
  }
  for (; i < k; ++i) {
    for (int64_t j = 0; j <= i; ++j) c(i, j) -= v[i] * w[j] + w[i] * v[j];
  }
}

}  // namespace sst::lanes
