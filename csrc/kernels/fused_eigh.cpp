#include "fused_eigh.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <new>
#include <numeric>

#include "lane_eigen.h"
#include "lane_group.h"
#include "vector.h"

namespace sst {

namespace {

using namespace lanes;

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
  g.bad |= ~((most <= std::numeric_limits<double>::max()) & (sum == sum)) & ~g.indefinite;  // sum: for NaN
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

int64_t fused_eigh_lanes(int set) {
  int64_t lanes = 0;
  by_set(set, [&]<int Bytes, int>() __attribute__((always_inline)) { lanes = Group<Bytes>::kLanes; });
  return lanes;
}

template <class T>
void fused_eigh_cpu(int set, const FusedEigh<T>& args, std::atomic<int64_t>& next) {
  by_set(set, [&]<int Bytes, int>() __attribute__((always_inline)) { solve_groups<Bytes>(args, next); });
}

template void fused_eigh_cpu(int, const FusedEigh<float>&, std::atomic<int64_t>&);
template void fused_eigh_cpu(int, const FusedEigh<double>&, std::atomic<int64_t>&);

}  // namespace sst
