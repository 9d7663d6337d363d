// Block Jacobi–Davidson iteration for the k largest θ of A v = θ B v, batched, A ⪰ 0 and B ≻ 0.
//
// After Sleijpen & van der Vorst (1996), with the thick restart of Stathopoulos & Saad (1998, GD+k), the correction
// equation of Notay (2002) and Stathopoulos & McCombs (2007), and locking. Departs from them in that every step is
// taken for a batch of pencils, each with as many new directions as the one in most need.
#pragma once

#include <algorithm>
#include <functional>

#include "kernels/ritz.h"
#include "operator.h"

namespace sst {

struct Options {
  int64_t k;               // wanted
  double tol;              // of the backward error
  double guard_tol;        // of that of pair k + 1, so that a cluster at k is seen
  int64_t block;           // directions added in an iteration
  int64_t keep, capacity;  // vectors after and before a restart
  int64_t window;          // wanted pairs that are sought at once; locked when they have converged
  int64_t max_iterations;
  int64_t inner;  // most steps of the correction equation's solver, once a pencil proves hard

  // How many pairs come back: those wanted, and what is kept beside the window.
  int64_t returned() const { return k + std::max<int64_t>(keep - window, 1); }
};

enum class Outcome : int64_t {
  converged = 1,
  max_iterations = 32,
  stagnated = 64,
  not_positive_definite = 8,
  non_finite = 16
};

inline bool is_fault(Outcome outcome) {
  return outcome == Outcome::non_finite || outcome == Outcome::not_positive_definite;
}

struct Counts {
  int64_t a = 0, b = 0, inverse = 0, iterations = 0;
};

struct Found {
  Tensor theta;                     // (N, r) float64, r >= k unless n is less
  Tensor vectors;                   // (N, r, n)
  Tensor eta;                       // (N, r) float64, by the products carried along
  std::vector<Outcome> outcome;     // of each pencil
  std::vector<double> guard_error;  // how far θ of pair k + 1 may be from λ, 0 if it met guard_tol
  std::vector<bool> certified;      // converged already by the products of the start: with nothing carried
};

constexpr int64_t kReported = kReportSize + 2;  // a report, and the notes of the orthonormalizer

// Called once an iteration with the reports (N, kReported); it may throw to end the iteration.
using Observer = std::function<void(const double* report, int64_t pencils)>;

// From the rows `start` (N, p, n); `fresh` (1, q, n) are random rows for a pencil that stagnates. `norms` (N, 2),
// estimates of ‖A‖ and ‖B‖ from below, grow. One host synchronisation an iteration, and one more where pencils finish;
// torch's eigh adds its own on CUDA for more than `fused_eigh_limit` vectors.
Found davidson(const Pencil& pencil, const Tensor& start, const Tensor& fresh, const Tensor& norms,
               const Options& options, Counts& counts, const Observer& observer);

}  // namespace sst
