// What the CPU kernel of fused_eigh.h does to a group of pencils once they are standard problems C y = λ y: Householder
// tridiagonalisation and implicit QL.
#pragma once

#include "lane_group.h"

namespace sst::lanes {

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

}  // namespace sst::lanes
