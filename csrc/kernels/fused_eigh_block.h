// The CUDA kernel of fused_eigh.h, for a block of threads: a pencil from its first to its last step in shared memory.
//
// Steps       L and C = L⁻¹ A L⁻ᵀ together, column after column (a right-looking Cholesky, and its eliminations applied
//             to both sides of A); cyclic Jacobi on C with vectors, the n / 2 rotations of a round-robin's round at
//             once; back substitution; ranks of the values.
// Jacobi      C_pq is annihilated while |C_pq| > eps √|C_pp C_qq|, the relative criterion of Demmel & Veselić (1992).
//             A sweep is n - 1 rounds; about 6 to 10 sweeps, quadratic at the end, at most kMostSweeps.
// Memory      C and L packed, rows of the lower triangle one after another: columns of it, too, lie in different banks
//             (consecutive triangle numbers differ mod 32). Vectors one to a row. About 2 n² elements in all: float32
//             up to n = 169 and float64 up to 119 in 227 KiB, 143 and 101 in 163 KiB.
// Cost        a round is two barriers, n² reads and n² writes of the vectors and half as many of C; device memory sees
//             A, B and the results alone.
#pragma once

#include <cmath>
#include <limits>

#include "block.h"
#include "fused_eigh.h"
#include "schedule.h"

namespace sst::cuda {

constexpr int kMostSweeps = 30;

template <class T>
struct FusedLayout {
  int n;

  SST_HOST_DEVICE static constexpr int triangle(int i) { return i * (i + 1) / 2; }
  SST_HOST_DEVICE int pitch() const { return n | 1; }
  SST_HOST_DEVICE int place(int element) const { return element * static_cast<int>(sizeof(T)); }
  // (i, j), j <= i.
  SST_HOST_DEVICE int c(int i, int j) const { return place(triangle(i) + j); }
  SST_HOST_DEVICE int l(int i, int j) const { return place(triangle(n) + triangle(i) + j); }
  // Component i of vector j.
  SST_HOST_DEVICE int v(int j, int i) const { return place(2 * triangle(n) + j * pitch() + i); }
  // Two vectors of n + 1 elements: columns of L and C, then cosines and sines of a round, then values.
  SST_HOST_DEVICE int x(int i) const { return place(2 * triangle(n) + n * pitch() + i); }
  SST_HOST_DEVICE int y(int i) const { return x(n + 1 + i); }
  SST_HOST_DEVICE int bytes() const { return y(n + 1); }
};

// Largest n whose layout fits.
template <class T>
int64_t fused_layout_limit(int64_t shared_bytes) {
  int n = 1;
  while (FusedLayout<T>{n + 1}.bytes() <= shared_bytes) ++n;
  return n;
}

// The two players of pair k in a round of a round-robin of n, p > q; p = n for the one that sits out if n is odd.
struct Pair {
  int p, q;
};
SST_HOST_DEVICE inline Pair round_robin(int n, int round, int k) {
  const int last = (n - 1) | 1;  // plays against each other in turn; the others turn modulo `last`
  const int after = round + k < last ? round + k : round + k - last, before = round < k ? round - k + last : round - k;
  const int a = k == 0 ? last : after, b = before;
  return a > b ? Pair{a, b} : Pair{b, a};
}

template <class T, int Threads>
struct FusedBlock {
  static constexpr int kThreads = Threads, kWarps = Threads / kWarp;
  static constexpr T kEps = std::numeric_limits<T>::epsilon(), kMax = std::numeric_limits<T>::max(),
                     kNaN = std::numeric_limits<T>::quiet_NaN();

  FusedEigh<T> args;
  int64_t member;
  FusedLayout<T> at;

  SST_DEVICE static bool finite(T x) { return std::fabs(x) <= kMax; }

  template <class Block>
  SST_DEVICE T get(Block& block, int t, int place) const {
    return block.template load<T>(t, place);
  }

  // f(i, j) for the thread's share of the elements j < width(i) of `rows` rows: a warp to a row.
  template <class Width, class F>
  SST_DEVICE static void share(int t, int rows, Width width, F f) {
    for (int i = t / kWarp; i < rows; i += kWarps) {
      for (int j = t % kWarp, end = width(i); j < end; j += kWarp) f(i, j);
    }
  }

  // Lower triangles of A and B; whether they are finite.
  template <class Block>
  SST_DEVICE bool read(Block& block) const {
    typename Block::template Each<int> broken;
    const T* const a = args.a.data + member * args.a.batch;
    const T* const b = args.b.data + member * args.b.batch;
    block.each([&](int t) {
      bool bad = false;
      share(
          t, at.n, [](int i) { return i + 1; },
          [&](int i, int j) {
            const T x = a[i * args.a.row + j * args.a.col], y = b[i * args.b.row + j * args.b.col];
            bad = bad || !finite(x) || !finite(y);
            block.store(t, at.c(i, j), x);
            block.store(t, at.l(i, j), y);
          });
      share(t, at.n, [&](int) { return at.n; }, [&](int i, int j) { block.store(t, at.v(i, j), T(i == j)); });
      broken[t] = bad;
    });
    return !block.barrier_any([&](int t) { return broken[t]; });
  }

  // L over B, and C over A. With l and c the scaled columns k of what is left of B and A, and α = c_k / l_k:
  //   B_ij -= l_i l_j        k < j <= i
  //   A_ij -= l_i c_j        j < k < i
  //   A_ik  = c_i - α l_i    k < i
  //   A_ij -= l_i c_j + (c_i - α l_i) l_j
  // False if a pivot is not positive.
  template <class Block>
  SST_DEVICE bool reduce(Block& block) const {
    const int n = at.n;
    typename Block::template Each<int> broken;
    for (int k = 0; k < n; ++k) {
      block.each([&](int t) {
        const T pivot = get(block, t, at.l(k, k));
        broken[t] = !(pivot > 0) || !finite(pivot);
        const T root = std::sqrt(pivot);
        for (int i = t; i < n; i += kThreads) {
          if (i > k) block.store(t, at.x(i), get(block, t, at.l(i, k)) / root);
          block.store(t, at.y(i), get(block, t, i < k ? at.c(k, i) : at.c(i, k)) / root);
        }
        if (t == 0) block.store(t, at.x(k), root);
      });
      if (block.barrier_any([&](int t) { return broken[t]; })) return false;
      block.each([&](int t) {
        const T root = get(block, t, at.x(k)), alpha = get(block, t, at.y(k)) / root;
        share(
            t, n - k, [&](int r) { return k + r + 1; },
            [&](int r, int j) {
              const int i = k + r;
              const T lj = j >= k ? get(block, t, at.x(j)) : T(0), cj = get(block, t, at.y(j));
              if (r == 0) {
                block.store(t, at.c(i, j), j == k ? alpha : cj);
                if (j == k) block.store(t, at.l(k, k), root);
                return;
              }
              const T li = get(block, t, at.x(i)), ci = get(block, t, at.y(i)) - alpha * li;
              if (j == k) {
                block.store(t, at.c(i, k), ci);
                block.store(t, at.l(i, k), li);
                return;
              }
              block.store(t, at.c(i, j), get(block, t, at.c(i, j)) - li * cj - ci * lj);
              if (j > k) block.store(t, at.l(i, j), get(block, t, at.l(i, j)) - li * lj);
            });
      });
      block.barrier();
    }
    return true;
  }

  // The rotation that annihilates C_pq, with its effect on these three elements; whether it turns.
  template <class Block>
  SST_DEVICE bool aim(Block& block, int t, int k, Pair pair) const {
    T cosine = 1, sine = 0;
    if (pair.p < at.n) {
      const T app = get(block, t, at.c(pair.p, pair.p)), aqq = get(block, t, at.c(pair.q, pair.q)),
              apq = get(block, t, at.c(pair.p, pair.q));
      if (std::fabs(apq) > kEps * std::sqrt(std::fabs(app)) * std::sqrt(std::fabs(aqq))) {
        const T theta = (aqq - app) / (2 * apq);  // infinite at worst
        const T tangent = std::fabs(theta) > 1 / kEps
                              ? 1 / (2 * theta)
                              : std::copysign(T(1), theta) / (std::fabs(theta) + std::sqrt(1 + theta * theta));
        if (tangent != 0) {
          cosine = 1 / std::sqrt(1 + tangent * tangent);
          sine = tangent * cosine;
          block.store(t, at.c(pair.p, pair.p), app - tangent * apq);
          block.store(t, at.c(pair.q, pair.q), aqq + tangent * apq);
        }
        block.store(t, at.c(pair.p, pair.q), T(0));
      }
    }
    block.store(t, at.x(k), cosine);
    block.store(t, at.y(k), sine);
    return sine != 0;
  }

  SST_DEVICE static void turn(T& p, T& q, T cosine, T sine) {
    const T old = p;
    p = cosine * old - sine * q;
    q = sine * old + cosine * q;
  }

  // The four elements of C that pairs i and j share, rotated by both.
  template <class Block>
  SST_DEVICE void turn_block(Block& block, int t, int round, int i, int j) const {
    const int n = at.n;
    const T si = get(block, t, at.y(i)), sj = get(block, t, at.y(j));
    if (si == 0 && sj == 0) return;
    const T ci = get(block, t, at.x(i)), cj = get(block, t, at.x(j));
    const Pair a = round_robin(n, round, i), b = round_robin(n, round, j);
    const int rows[2] = {a.p, a.q}, cols[2] = {b.p, b.q};
    T x[2][2];
    SST_UNROLL
    for (int r = 0; r < 2; ++r) {
      SST_UNROLL
      for (int c = 0; c < 2; ++c) {
        const int high = rows[r] > cols[c] ? rows[r] : cols[c], low = rows[r] > cols[c] ? cols[c] : rows[r];
        x[r][c] = high < n ? get(block, t, at.c(high, low)) : T(0);
      }
    }
    SST_UNROLL
    for (int c = 0; c < 2; ++c) turn(x[0][c], x[1][c], ci, si);
    SST_UNROLL
    for (int r = 0; r < 2; ++r) turn(x[r][0], x[r][1], cj, sj);
    SST_UNROLL
    for (int r = 0; r < 2; ++r) {
      SST_UNROLL
      for (int c = 0; c < 2; ++c) {
        const int high = rows[r] > cols[c] ? rows[r] : cols[c], low = rows[r] > cols[c] ? cols[c] : rows[r];
        if (high < n) block.store(t, at.c(high, low), x[r][c]);
      }
    }
  }

  // The pairs' vectors.
  template <class Block>
  SST_DEVICE void turn_vectors(Block& block, int t, int round, int pairs) const {
    for (int k = t / kWarp; k < pairs; k += kWarps) {
      const T cosine = get(block, t, at.x(k)), sine = get(block, t, at.y(k));
      if (sine == 0) continue;
      const Pair pair = round_robin(at.n, round, k);
      for (int i = t % kWarp; i < at.n; i += kWarp) {
        T p = get(block, t, at.v(pair.p, i)), q = get(block, t, at.v(pair.q, i));
        turn(p, q, cosine, sine);
        block.store(t, at.v(pair.p, i), p);
        block.store(t, at.v(pair.q, i), q);
      }
    }
  }

  // False if the last sweep still turned.
  template <class Block>
  SST_DEVICE bool diagonalise(Block& block) const {
    const int n = at.n, pairs = (n + 1) / 2, rounds = (n - 1) | 1;
    typename Block::template Each<int> turned;
    for (int sweep = 0; sweep < kMostSweeps; ++sweep) {
      block.each([&](int t) { turned[t] = false; });
      for (int round = 0; round < rounds; ++round) {
        block.each([&](int t) {
          for (int k = t; k < pairs; k += kThreads) {
            turned[t] = aim(block, t, k, round_robin(n, round, k)) || turned[t];
          }
        });
        block.barrier();
        block.each([&](int t) {
          // Rows i and pairs - 1 - i of the triangle j < i, end to end.
          share(
              t, (pairs + 1) / 2, [&](int r) { return 2 * r == pairs - 1 ? r : pairs - 1; },
              [&](int r, int j) {
                const int long_row = pairs - 1 - r;
                if (j < long_row) {
                  turn_block(block, t, round, long_row, j);
                } else {
                  turn_block(block, t, round, r, j - long_row);
                }
              });
          turn_vectors(block, t, round, pairs);
        });
        block.barrier();
      }
      if (!block.barrier_any([&](int t) { return turned[t]; })) return true;
    }
    return false;
  }

  // V = L⁻ᵀ Y, from the last component of every vector to the first.
  template <class Block>
  SST_DEVICE void back_substitute(Block& block) const {
    const int n = at.n;
    for (int k = n - 1; k >= 0; --k) {
      block.each([&](int t) {
        const T pivot = get(block, t, at.l(k, k));
        share(
            t, n, [&](int) { return k; },
            [&](int j, int i) {
              const T x = get(block, t, at.v(j, k)) / pivot;
              block.store(t, at.v(j, i), get(block, t, at.v(j, i)) - x * get(block, t, at.l(k, i)));
            });
      });
      block.barrier();
    }
  }

  // Pairs in ascending order; whether they are finite.
  template <class Block>
  SST_DEVICE bool write(Block& block) const {
    const int n = at.n;
    T* const values = args.values + member * n;
    T* const vectors = args.vectors + member * n * n;
    typename Block::template Each<int> broken;
    block.each([&](int t) {
      bool bad = false;
      for (int j = t / kWarp; j < n; j += kWarps) {
        const T value = get(block, t, at.c(j, j));
        int rank = 0;
        for (int i = 0; i < n; ++i) {
          const T other = get(block, t, at.c(i, i));
          rank += other < value || (other == value && i < j);
        }
        bad = bad || !finite(value);
        if (t % kWarp == 0) values[rank] = value;
        for (int i = t % kWarp; i < n; i += kWarp) {
          const T x = get(block, t, at.v(j, i)) / get(block, t, at.l(i, i));
          bad = bad || !finite(x);
          vectors[static_cast<int64_t>(rank) * n + i] = x;
        }
      }
      broken[t] = bad;
    });
    return !block.barrier_any([&](int t) { return broken[t]; });
  }

  template <class Block>
  SST_DEVICE int32_t solve(Block& block) const {
    if (!read(block)) return kFusedNotFinite;
    if (!reduce(block)) return kFusedIndefinite;
    if (!diagonalise(block)) return kFusedNotConverged;
    back_substitute(block);
    return write(block) ? kFusedOk : kFusedNotFinite;
  }

  template <class Block>
  SST_DEVICE void run(Block& block) const {
    const int32_t info = solve(block);
    const int64_t n = at.n;
    block.each([&](int t) {
      if (t == 0) args.info[member] = info;
      if (info == kFusedOk) return;
      for (int64_t i = t; i < n; i += kThreads) args.values[member * n + i] = kNaN;
      for (int64_t i = t; i < n * n; i += kThreads) args.vectors[member * n * n + i] = kNaN;
    });
  }
};

}  // namespace sst::cuda
