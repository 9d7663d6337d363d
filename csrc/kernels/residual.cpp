#include "residual.h"

#include "vector.h"

namespace sst {

namespace {

// r and the squares of one row: sums[k][l] takes the elements whose index is l modulo the lanes of two vectors.
template <int Bytes, class T>
[[gnu::always_inline]] inline void residual_row(const T* ax, const T* bx, const T* x, double theta, int64_t n, T* r,
                                                double* norms) {
  constexpr int64_t lanes = Bytes / sizeof(double), step = 2 * lanes;
  using Wide = Vector<Bytes, double>;
  using Narrow = Vector<lanes * sizeof(T), T>;
  Wide sums[kResidualNorms][2] = {};
  const auto widen = [](const T* from, Wide& to) __attribute__((always_inline)) {
    to = __builtin_convertvector(*reinterpret_cast<const Narrow*>(from), Wide);
  };
  int64_t i = 0;
  for (; i + step <= n; i += step) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const int64_t at = i + half * lanes;
      Wide a, b, v, rounded;
      widen(ax + at, a);
      widen(bx + at, b);
      widen(x + at, v);
      *reinterpret_cast<Narrow*>(r + at) = __builtin_convertvector(a - theta * b, Narrow);
      widen(r + at, rounded);
      sums[0][half] += rounded * rounded;
      sums[1][half] += a * a;
      sums[2][half] += b * b;
      sums[3][half] += v * v;
    }
  }
  double rest[kResidualNorms] = {};
  for (; i < n; ++i) {
    const double a = ax[i], b = bx[i], v = x[i];
    r[i] = static_cast<T>(a - theta * b);
    rest[0] += static_cast<double>(r[i]) * r[i];
    rest[1] += a * a;
    rest[2] += b * b;
    rest[3] += v * v;
  }
  for (int k = 0; k < kResidualNorms; ++k) {
    const Wide both = sums[k][0] + sums[k][1];
    norms[k] = rest[k];
    for (int64_t l = 0; l < lanes; ++l) norms[k] += both[l];
  }
}

}  // namespace

template <class T>
void residual_cpu(const Residual<T>& args, std::atomic<int64_t>& next, int set) {
  by_set(set, [&]<int Bytes, int>() __attribute__((always_inline)) {
    for (int64_t index = next++; index < args.batch * args.rows; index = next++) {
      const int64_t member = index / args.rows, row = index % args.rows;
      residual_row<Bytes>(args.ax.at(member, row), args.bx.at(member, row), args.x.at(member, row),
                          *args.theta.at(member, row), args.n, args.r + index * args.n,
                          args.norms + index * kResidualNorms);
    }
  });
}

template void residual_cpu(const Residual<float>&, std::atomic<int64_t>&, int);
template void residual_cpu(const Residual<double>&, std::atomic<int64_t>&, int);

}  // namespace sst
