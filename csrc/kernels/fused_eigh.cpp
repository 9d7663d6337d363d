#include "fused_eigh.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <new>
#include <numeric>

#include "panel.h"
#include "vector.h"

#define SST_INLINE [[gnu::always_inline]] inline

namespace sst {

namespace {

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

// T = Qᵀ C Q tridiagonal, Q = H_(n-1) … H_1, H_k = I - τ v vᵀ on the first k coordinates, from the last row up, so that
// a matrix graded downwards stays so, as QL wants it. v replaces row k of C, τ its diagonal element.
template <class G>
SST_INLINE void tridiagonalise(G& g) {
  using V = typename G::V;
  const View<V> c{g.c, g.stride, 1};
  for (int64_t k = g.n - 1; k > 0; --k) {
    V* const v = &c(k, 0);
    g.d[k] = c(k, k);
    V tail = {};
    for (int64_t j = 0; j < k - 1; ++j) tail += v[j] * v[j];
    const V head = v[k - 1], norm = root(head * head + tail), beta = head < 0 ? norm : -norm;
    const auto needed = tail > 0;
    const V tau = needed ? (beta - head) / beta : G::full(0), scale = needed ? 1 / (head - beta) : G::full(0);
    g.e[k - 1] = needed ? beta : head;
    for (int64_t j = 0; j < k - 1; ++j) v[j] *= scale;
    v[k - 1] = G::full(1);
    c(k, k) = tau;
    multiply(c, k, v, g.w);
    V dot = {};
    for (int64_t j = 0; j < k; ++j) {
      g.w[j] *= tau;
      dot += g.w[j] * v[j];
    }
    const V half = 0.5 * tau * dot;
    for (int64_t j = 0; j < k; ++j) g.w[j] -= half * v[j];
    update(c, k, v, g.w);
  }
  g.d[0] = c(0, 0);
  g.e[g.n - 1] = V{};
}

// Z = Q, one column of Q to a row of z.
template <class G>
SST_INLINE void form_q(G& g) {
  using V = typename G::V;
  const View<V> z{g.z, g.stride, 1};
  z(0, 0) = G::full(1);
  for (int64_t k = 1; k < g.n; ++k) {
    const V* const v = g.c + k * g.stride;
    const V tau = v[k];
    for (int64_t j = 0; j < k; ++j) z(k, j) = z(j, k) = V{};
    z(k, k) = G::full(1);
    for (int64_t i = 0; i < k; ++i) {
      V* const row = &z(i, 0);
      V dot[2] = {};
      int64_t j = 0;
      for (; j + 2 <= k; j += 2) {
        dot[0] += row[j] * v[j];
        dot[1] += row[j + 1] * v[j + 1];
      }
      if (j < k) dot[0] += row[j] * v[j];
      const V factor = tau * (dot[0] + dot[1]);
      for (j = 0; j < k; ++j) row[j] -= factor * v[j];
    }
  }
}

// The block [first, last] of T that each lane works on next, indices as numbers, which compare faster than integers:
// first is where the lane has converged up to, last the next index whose subdiagonal element is negligible. A lane that
// is done has first = last = n - 1.
template <class G>
SST_INLINE void find_blocks(const G& g, typename G::V& first, typename G::V& last, int64_t from) {
  using V = typename G::V;
  typename G::I searching = ~typename G::I{};
  last = G::full(static_cast<double>(g.n - 1));
  V here = G::absolute(g.d[from]);
  for (int64_t i = from; i < g.n - 1; ++i) {
    const V next = G::absolute(g.d[i + 1]), index = G::full(static_cast<double>(i));
    const auto small = (G::absolute(g.e[i]) <= kEps * (here + next) + 1e-150) & (index >= first) & searching;
    const auto done = small & (index == first), found = small & ~done;
    first = done ? first + 1 : first;
    last = found ? index : last;
    searching &= ~found;
    here = next;
  }
}

// Width columns of z, the same rows of all of Z, turn by the waiting rotations, while L1 holds them.
template <int Width, class G>
SST_INLINE void turn_columns(const G& g, int64_t j) {
  using V = typename G::V;
  for (int64_t step = 0; step < g.waiting; ++step) {
    const int64_t from = g.sweeps[step].begin, to = g.sweeps[step].end;
    const V* const turns = g.turns + 2 * g.n * step;
    V* z = g.z + to * g.stride + j;
    V high[Width];
    for (int w = 0; w < Width; ++w) high[w] = z[w];
    for (int64_t i = to - 1; i >= from; --i, z -= g.stride) {
      const V c = turns[2 * i], s = turns[2 * i + 1];
#pragma GCC unroll 4
      for (int w = 0; w < Width; ++w) {
        const V low = (z - g.stride)[w];
        z[w] = s * low + c * high[w];
        high[w] = c * low - s * high[w];
      }
    }
    for (int w = 0; w < Width; ++w) z[w] = high[w];
  }
}

template <class G>
SST_INLINE void turn(G& g) {
  int64_t j = 0;
  for (; j + kTile <= g.n; j += kTile) turn_columns<kTile>(g, j);
  for (; j < g.n; ++j) turn_columns<1>(g, j);
  g.waiting = 0;
}

// An implicit QL step with Wilkinson's shift on each lane's block. Its rotations are left to wait for others.
template <class G>
SST_INLINE void ql_step(G& g, typename G::V first, typename G::V last) {
  using V = typename G::V;
  int64_t from = g.n, to = 0;
  V shift = {};
  for (int64_t lane = 0; lane < G::kLanes; ++lane) {
    const auto l = static_cast<int64_t>(first[lane]), m = static_cast<int64_t>(last[lane]);
    if (l == m) continue;
    from = std::min(from, l);
    to = std::max(to, m);
    const double e = g.e[l][lane], t = (g.d[l + 1][lane] - g.d[l][lane]) / (2 * e);
    shift[lane] = g.d[m][lane] - g.d[l][lane] + e / (t + std::copysign(std::sqrt(t * t + 1), t));
  }
  const V one = G::full(1), zero = {};
  V c = one, s = one, p = zero, q = shift;
  V* const turns = g.turns + 2 * g.n * g.waiting;
  auto alive = first != last;
  for (int64_t i = to - 1; i >= from; --i) {
    const V index = G::full(static_cast<double>(i));
    const auto active = alive & (index < last) & (index >= first);
    V f = s * g.e[i], r = root(f * f + q * q);
    const V b = c * g.e[i];
    const auto lost = active & (r == 0);  // the block falls apart here
    const auto turn = active & ~lost;
    g.e[i + 1] = active ? r : g.e[i + 1];
    g.d[i + 1] = lost ? g.d[i + 1] - p : g.d[i + 1];
    alive &= ~lost;
    r = turn ? r : one;
    s = turn ? f / r : s;
    c = turn ? q / r : c;
    const V t = g.d[i + 1] - p, turned = (g.d[i] - t) * s + 2 * c * b;
    p = turn ? s * turned : p;
    g.d[i + 1] = turn ? t + p : g.d[i + 1];
    q = turn ? c * turned - b : q;
    turns[2 * i] = turn ? c : one;
    turns[2 * i + 1] = turn ? s : zero;
  }
  g.sweeps[g.waiting++] = {from, to};
  for (int64_t lane = 0; lane < G::kLanes; ++lane) {
    const auto l = static_cast<int64_t>(first[lane]), m = static_cast<int64_t>(last[lane]);
    if (l == m) continue;
    if (alive[lane]) {
      g.d[l][lane] -= p[lane];
      g.e[l][lane] = q[lane];
    }
    g.e[m][lane] = 0;
  }
}

// T = Y Λ Yᵀ: Λ over d, and Z becomes Q Y.
template <class G>
SST_INLINE void diagonalise(G& g) {
  typename G::V first = {}, last;
  for (int64_t steps = 0, from = 0;; ++steps) {
    find_blocks(g, first, last, from);
    g.unfinished = first != last;
    if (!G::any(g.unfinished) || steps == 30 * g.n) break;
    ql_step(g, first, last);
    if (g.waiting == kWaiting) turn(g);
    double least = first[0];
    for (int64_t lane = 1; lane < G::kLanes; ++lane) least = std::min<double>(least, first[lane]);
    from = static_cast<int64_t>(least);
  }
  turn(g);
}

// Lanes without a result get C = 0; the others C 2^-x with elements near 1, x returned.
template <class G>
SST_INLINE typename G::I scale(G& g) {
  using V = typename G::V;
  V most = {}, sum = {};
  for (int64_t i = 0; i < g.n; ++i) {
    for (int64_t j = 0; j <= i; ++j) {
      const V x = G::absolute(g.c[i * g.stride + j]);
      most = x > most ? x : most;
      sum += x;
    }
  }
  typename G::I exponent = {};
  g.bad |= ~(sum <= std::numeric_limits<double>::max()) & ~g.indefinite;
  V factor = {};
  for (int64_t lane = 0; lane < G::kLanes; ++lane) {
    if (g.bad[lane] || g.indefinite[lane] || most[lane] == 0) continue;
    exponent[lane] = std::clamp(std::ilogb(most[lane]), -1000, 1000);
    factor[lane] = std::ldexp(1.0, -static_cast<int>(exponent[lane]));
  }
  for (int64_t i = 0; i < g.n; ++i) {
    for (int64_t j = 0; j <= i; ++j) {
      V& x = g.c[i * g.stride + j];
      x = factor > 0 ? x * factor : V{};
    }
  }
  return exponent;
}

// Members [first, first + count) into the lanes; both triangles of A. A member that is not finite, and a lane without a
// member, becomes A = 0, B = I.
template <class G, class T>
SST_INLINE void pack(G& g, const FusedEigh<T>& args, int64_t first, int64_t count) {
  g.bad = g.indefinite = typename G::I{};
  for (int64_t lane = 0; lane < G::kLanes; ++lane) {
    const int64_t member = first + std::min(lane, count - 1);
    const T* const a = args.a.data + member * args.a.batch;
    const T* const b = args.b.data + member * args.b.batch;
    double *const c = reinterpret_cast<double*>(g.c) + lane, *const l = reinterpret_cast<double*>(g.l) + lane;
    bool finite = true;
    for (int64_t i = 0; i < g.n; ++i) {
      for (int64_t j = 0; j <= i; ++j) {
        const double x = a[i * args.a.row + j * args.a.col], y = b[i * args.b.row + j * args.b.col];
        finite &=
            std::abs(x) <= std::numeric_limits<double>::max() && std::abs(y) <= std::numeric_limits<double>::max();
        c[(i * g.stride + j) * G::kLanes] = c[(j * g.stride + i) * G::kLanes] = x;
        l[(i * g.stride + j) * G::kLanes] = y;
      }
    }
    if (finite) continue;
    g.bad[lane] = -1;
    for (int64_t i = 0; i < g.n; ++i) {
      for (int64_t j = 0; j < g.n; ++j) {
        c[(i * g.stride + j) * G::kLanes] = 0;
        if (j <= i) l[(i * g.stride + j) * G::kLanes] = i == j;
      }
    }
  }
}

// The lanes' pairs in ascending order, or NaN.
template <class G, class T>
SST_INLINE void unpack(const G& g, const FusedEigh<T>& args, int64_t first, int64_t count, typename G::I exponent,
                       int64_t* order) {
  for (int64_t lane = 0; lane < count; ++lane) {
    T* const values = args.values + (first + lane) * g.n;
    T* const vectors = args.vectors + (first + lane) * g.n * g.n;
    const auto value = [&](int64_t i) { return reinterpret_cast<const double*>(g.d + i)[lane]; };
    int32_t info = g.bad[lane] ? kFusedNotFinite : g.indefinite[lane] ? kFusedIndefinite : kFusedOk;
    if (info == kFusedOk && g.unfinished[lane]) info = kFusedNotConverged;
    T peak = 0;
    if (info == kFusedOk) {
      std::iota(order, order + g.n, 0);
      std::sort(order, order + g.n, [&](int64_t i, int64_t j) { return value(i) < value(j); });
      for (int64_t j = 0; j < g.n; ++j) {
        const double* const from = reinterpret_cast<const double*>(g.z + order[j] * g.stride) + lane;
        values[j] = static_cast<T>(std::ldexp(value(order[j]), static_cast<int>(exponent[lane])));
        T sum = std::abs(values[j]);
        for (int64_t i = 0; i < g.n; ++i) {
          vectors[j * g.n + i] = static_cast<T>(from[i * G::kLanes]);
          sum += std::abs(vectors[j * g.n + i]);
        }
        peak = sum <= std::numeric_limits<T>::max() ? peak : sum;
      }
      if (peak != 0) info = kFusedNotFinite;
    }
    args.info[first + lane] = info;
    if (info == kFusedOk) continue;
    std::fill_n(values, g.n, std::numeric_limits<T>::quiet_NaN());
    std::fill_n(vectors, g.n * g.n, std::numeric_limits<T>::quiet_NaN());
  }
}

template <int Bytes, class T>
SST_INLINE void solve_groups(const FusedEigh<T>& args, std::atomic<int64_t>& next) {
  using G = Group<Bytes>;
  using V = typename G::V;
  const int64_t n = args.n, stride = n | 1, groups = (args.batch + G::kLanes - 1) / G::kLanes;
  struct Free {
    void operator()(void* p) const { ::operator delete(p, std::align_val_t{64}); }
  };
  const auto bytes = static_cast<size_t>((3 * n * stride + (4 + 2 * kWaiting) * n) * Bytes);
  const std::unique_ptr<void, Free> memory(::operator new(bytes, std::align_val_t{64}));
  const std::unique_ptr<int64_t[]> order(new int64_t[n]);
  G g;
  g.n = n;
  g.stride = stride;
  g.waiting = 0;
  V* at = static_cast<V*>(memory.get());
  for (V** part : {&g.l, &g.c, &g.z}) *part = at, at += n * stride;
  for (V** part : {&g.inverse, &g.d, &g.e, &g.w}) *part = at, at += n;
  g.turns = at;
  for (int64_t group = next++; group < groups; group = next++) {
    const int64_t first = group * G::kLanes, count = std::min(G::kLanes, args.batch - first);
    pack(g, args, first, count);
    factor(g);
    reduce(g);
    const auto exponent = scale(g);
    tridiagonalise(g);
    form_q(g);
    diagonalise(g);
    // V = L⁻ᵀ Y, for its rows from right to left.
    const int64_t last = n - 1;
    const View<V> y{g.z + last, stride, -1}, l{g.l + last * stride + last, -1, -stride};
    solve_rows<false>(y, y, l, g.inverse + last, -1, n);
    unpack(g, args, first, count, exponent, order.get());
  }
}

}  // namespace

int64_t fused_eigh_lanes() {
  const int set = instruction_set_in_use();
  int64_t lanes = 0;
  by_set(set, [&]<int Bytes, int>() __attribute__((always_inline)) { lanes = Group<Bytes>::kLanes; });
  return lanes;
}

template <class T>
void fused_eigh_cpu(const FusedEigh<T>& args, std::atomic<int64_t>& next) {
  by_set(instruction_set_in_use(),
         [&]<int Bytes, int>() __attribute__((always_inline)) { solve_groups<Bytes>(args, next); });
}

template void fused_eigh_cpu(const FusedEigh<float>&, std::atomic<int64_t>&);
template void fused_eigh_cpu(const FusedEigh<double>&, std::atomic<int64_t>&);

}  // namespace sst
