// The bodies of ritz.h, as phases of a block of kThreads threads on one pencil: CUDA's, and the CPU's with one thread.
#pragma once

#include <cmath>

#include "block.h"
#include "ritz.h"

namespace sst::cuda {

constexpr int kRitzThreads = 128;

SST_DEVICE bool is_finite(double x) { return x - x == 0.0; }

template <int kThreads, class Block>
SST_DEVICE void ritz_matrix(Block& block, const RitzMatrix& args, int64_t pencil) {
  const int64_t m = args.m;
  const double* const h = args.h + pencil * args.h_batch;
  const double* const valid = args.valid + pencil * args.valid_batch;
  double* const out = args.out + pencil * m * m;
  const auto at = [&](int64_t i, int64_t j) { return h[(i > j ? i : j) * args.h_row + (i > j ? j : i)]; };
  // The largest |H| of each row, in the first column of `out` for now; NaN sticks.
  block.each([&](int t) {
    for (int64_t i = t; i < m; i += kThreads) {
      double largest = 0;
      for (int64_t j = 0; j < m; ++j) {
        if (valid[i] == 0 || valid[j] == 0) continue;
        const double x = std::fabs(at(i, j));
        if (!(x <= largest)) largest = x;
        if (!is_finite(x)) break;
      }
      out[i * m] = largest;
    }
  });
  block.barrier();
  block.each([&](int t) {
    if (t != 0) return;
    double largest = 0;
    bool finite = true;
    int64_t rank = 0;
    for (int64_t i = 0; i < m; ++i) {
      rank += valid[i] != 0;
      finite = finite && is_finite(out[i * m]);
      if (out[i * m] > largest) largest = out[i * m];
    }
    args.broken[pencil] = finite ? 0 : 1;
    args.largest[pencil] = largest;
    for (int64_t i = 0; i < m; ++i) args.sorted_valid[pencil * m + i] = i < rank;
  });
  block.barrier();
  block.each([&](int t) {
    const bool broken = args.broken[pencil] != 0;
    const double last = args.largest[pencil] > 0 ? m * args.largest[pencil] : 1;
    const int width = static_cast<int>(m);  // 64-bit division costs a call, and spills
    for (int e = t; e < width * width; e += kThreads) {
      const int i = e / width, j = e % width;
      const bool vectors = valid[i] != 0 && valid[j] != 0;
      out[e] = broken ? i == j : vectors ? -at(i, j) : i == j ? last : 0;
    }
  });
}

template <int kThreads, class Block>
SST_DEVICE void orthonormalizer(Block& block, const Orthonormalizer& args, int64_t pencil) {
  const int64_t m = args.m, p = args.p;
  const double* const c = args.c + pencil * m * p;
  const double* const g = args.g + pencil * p * p;
  double* const matrix = args.work + pencil * (2 * p + 3) * p;  // D(G − CᵀC)D
  double* const factor = matrix + p * p;                        // row i: of T's row i, column s: of step s
  double* const scale = factor + p * p;
  double* const pivot = scale + p;  // what is left of each diagonal entry; −1 once it is used
  double* const order = pivot + p;  // row of step s, −1 for none
  double* const out = args.out + pencil * p * (m + p);
  double* const valid = args.valid + pencil * args.valid_batch;

  block.each([&](int t) {
    for (int64_t i = t; i < p; i += kThreads) {
      const double gii = g[i * p + i];
      scale[i] = gii > 0 && is_finite(gii) ? 1 / std::sqrt(gii) : 0;
      order[i] = -1;
      valid[i] = 0;
    }
    for (int64_t e = t; e < p * (m + p); e += kThreads) out[e] = 0;
  });
  block.barrier();
  block.each([&](int t) {
    for (int64_t e = t; e < p * p; e += kThreads) {
      const int64_t i = e / p, j = e % p;
      double sum = 0.5 * (g[i * p + j] + g[j * p + i]);
      for (int64_t l = 0; l < m; ++l) sum -= c[l * p + i] * c[l * p + j];
      matrix[e] = sum * scale[i] * scale[j];
      if (i == j) pivot[i] = scale[i] > 0 && is_finite(matrix[e]) ? matrix[e] : 0;
    }
    if (t == 0) {
      double negative = 0;
      for (int64_t i = 0; i < p; ++i) {
        if (!args.magnitude || g[i * p + i] >= 0) continue;
        const double bound = args.rounding * args.rounding * args.magnitude[pencil * p + i];
        negative += g[i * p + i] * g[i * p + i] > bound;
      }
      args.notes[2 * pencil] += negative;
    }
  });
  block.barrier();
  for (int64_t s = 0; s < p; ++s) {
    block.each([&](int t) {
      if (t != 0) return;
      int64_t best = -1;
      for (int64_t i = 0; i < p; ++i) {
        if (pivot[i] > args.drop && (best < 0 || pivot[i] > pivot[best])) best = i;
      }
      if (best < 0) return;
      order[s] = static_cast<double>(best);
      factor[best * p + s] = std::sqrt(pivot[best]);
      if (args.notes[2 * pencil + 1] * pivot[best] < 1) args.notes[2 * pencil + 1] = 1 / pivot[best];
      pivot[best] = -1;
      valid[best] = 1;
    });
    block.barrier();
    if (order[s] < 0) break;
    block.each([&](int t) {
      const auto best = static_cast<int64_t>(order[s]);
      for (int64_t i = t; i < p; i += kThreads) {
        if (pivot[i] < 0) continue;
        double sum = matrix[i * p + best];
        for (int64_t r = 0; r < s; ++r) sum -= factor[i * p + r] * factor[best * p + r];
        const double entry = sum / factor[best * p + s];
        factor[i * p + s] = entry;
        pivot[i] = pivot[i] > entry * entry ? pivot[i] - entry * entry : 0;
      }
    });
    block.barrier();
  }
  // Rows of L⁻¹ D in the columns of T, by forward substitution: column after column, a thread each.
  block.each([&](int t) {
    for (int64_t r = t; r < p && order[r] >= 0; r += kThreads) {
      const auto column = static_cast<int64_t>(order[r]);
      for (int64_t s = r; s < p && order[s] >= 0; ++s) {
        const auto row = static_cast<int64_t>(order[s]);
        double sum = s == r ? scale[column] : 0;
        for (int64_t q = r; q < s; ++q) {
          sum -= factor[row * p + q] * out[static_cast<int64_t>(order[q]) * (m + p) + m + column];
        }
        out[row * (m + p) + m + column] = sum / factor[row * p + s];
      }
    }
  });
  block.barrier();
  block.each([&](int t) {
    for (int64_t e = t; e < p * m; e += kThreads) {
      const int64_t i = e / m, l = e % m;
      double sum = 0;
      for (int64_t j = 0; j < p; ++j) {
        if (valid[j] != 0) sum -= out[i * (m + p) + m + j] * c[l * p + j];  // what is dropped may be NaN
      }
      out[i * (m + p) + l] = sum;
    }
  });
}

template <int kThreads, class Block>
SST_DEVICE void judge(Block& block, const Judge& args, int64_t pencil) {
  const int64_t w = args.w;
  const double* const squares = args.squares + pencil * w * 4;
  const double* const theta = args.theta + pencil * args.theta_batch;
  double *const norms = args.norms + pencil * 2, *const eta = args.eta + pencil * w;
  double* const report = args.report + pencil * kReportSize;
  block.each([&](int t) {
    if (t != 0) return;
    for (int64_t i = 0; i < w; ++i) {
      for (int side = 0; side < 2; ++side) {
        const double ratio = std::sqrt(squares[4 * i + 1 + side] / squares[4 * i + 3]);
        if (is_finite(ratio) && ratio > norms[side]) norms[side] = ratio;
      }
    }
  });
  block.barrier();
  block.each([&](int t) {
    for (int64_t i = t; i < w; i += kThreads) {
      const double size = (norms[0] + std::fabs(theta[i]) * norms[1]) * std::sqrt(squares[4 * i + 3]);
      const double residual = std::sqrt(squares[4 * i]);
      // A row of no vector counts as far from converged, but for products that are not finite; 0/0 is the residual of A
      // = 0.
      eta[i] = squares[4 * i + 3] == 0 && is_finite(residual) ? 1 : residual == 0 ? 0 : residual / size;
    }
  });
  block.barrier();
  block.each([&](int t) {
    if (t != 0) return;
    double leading = 0, unconverged = 0, worst = 0, progress = 0, broken = 0;
    for (int64_t i = 0; i < args.window; ++i) {
      const bool converged = eta[i] <= args.tol;
      if (converged && leading == static_cast<double>(i)) ++leading;
      unconverged += !converged;
      broken += !is_finite(eta[i]);
      worst = eta[i] > worst ? eta[i] : worst;
      progress += std::log(eta[i] > args.tol ? eta[i] : args.tol);
    }
    report[kLeading] = leading;
    report[kUnconverged] = unconverged;
    report[kWorst] = worst;
    report[kProgress] = progress;
    bool guard = false;
    report[kGuardError] = 0;
    if (args.window < w) {
      const double* const square = squares + 4 * args.window;
      const double error = std::sqrt(square[0]) * std::sqrt(square[3]);
      const bool reaches = theta[args.window] + error >= theta[args.window - 1] && eta[args.window] > args.tol;
      guard = is_finite(args.guard_tol) && (eta[args.window] > args.guard_tol || reaches);
      if (guard) report[kGuardError] = error;
    }
    report[kGuard] = guard;
    report[kBroken] = broken;
    int64_t* const chosen = args.chosen + pencil * args.p;
    int64_t count = 0;
    for (int pass = 0; pass < 3; ++pass) {
      for (int64_t i = 0; i < w && count < args.p; ++i) {
        const bool needed = i < args.window ? eta[i] > args.tol : i == args.window && guard;
        const int rank = needed ? 0 : i >= args.window ? 1 : 2;
        if (rank == pass) chosen[count++] = i;
      }
    }
    for (int64_t q = 0; q < args.p; ++q) {
      const double residual = squares[4 * chosen[q]];
      const bool usable = residual > 0 && is_finite(residual);
      args.scale[pencil * args.p + q] = usable ? 1 / std::sqrt(residual) : 0;
      args.refill[pencil * args.p + q] = !usable;
    }
  });
}

}  // namespace sst::cuda
