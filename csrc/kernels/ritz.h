// The small dense steps of a block Rayleigh–Ritz iteration, one pencil each: everything of order m (the basis) or p
// (the block) that is not a product or an eigendecomposition. All in float64.
//
//   ritz_matrix     −H for the eigensolver (so that θ descends), rows of no vector set apart
//   orthonormalizer M (p × (m + p)) with M [S; T] B-orthonormal and B-orthogonal to S
//   judge           backward errors η, which pairs to expand by, and a report of kReportSize numbers for the host
//
// Layout      row-major, adjacent in the last dimension; one pencil after another by the strides given.
// CPU         a pencil a unit. CUDA: one block of 128 threads a pencil, all in global memory.
// Determinism every sum in a fixed order.
// Reference   tests/native/test_ritz.cpp, which holds both to the definitions below.
#pragma once

#include <atomic>
#include <cstdint>

#include "scalar.h"

namespace sst {

// out = −H, H from its lower triangle; rows of no vector (valid[i] = 0) become e_i times m max |H|, so that
// their eigenvalues come last: of the eigenvectors in order, the first Σ valid are vectors (sorted_valid). If H is not
// finite, out = I and broken[0] = 1, else 0.
struct RitzMatrix {
  int64_t batch, m;
  const double* h;
  int64_t h_batch, h_row;
  const double* valid;  // (batch, m), stride valid_batch
  int64_t valid_batch;
  double *out, *sorted_valid;  // (batch, m, m), (batch, m)
  double *broken, *largest;    // (batch)
};

// With C = S (BT)ᵀ (m × p), G = T (BT)ᵀ (p × p): Cholesky of the scaled D(G − CᵀC)D with pivoting, D = diag(G)^-½;
// directions whose pivot is at most `drop` are dropped: zero rows of M, valid = 0. M = L⁻¹ D [−Cᵀ, I], rows in the
// order of T. notes[0] += 1 for each t with tᵀBt < −rounding ‖t‖ ‖Bt‖: B is not positive definite. notes[1] = the
// largest 1/pivot so far: by its root, BT may lose accuracy when it is carried along.
struct Orthonormalizer {
  int64_t batch, m, p;
  const double *c, *g;      // (batch, m, p), (batch, p, p)
  const double* magnitude;  // (batch, p): ‖t‖² ‖Bt‖², null if not known
  double drop, rounding;
  double* work;   // (batch, 2p + 3, p)
  double* out;    // (batch, p, m + p)
  double* valid;  // (batch, p), stride valid_batch
  int64_t valid_batch;
  double* notes;  // (batch, 2)
};

// What judge tells the host of each pencil.
enum Report { kLeading, kUnconverged, kWorst, kProgress, kGuard, kGuardError, kBroken, kReportSize };

// η_i = ‖r_i‖ / ((‖A‖ + |θ_i| ‖B‖) ‖x_i‖) for the first w pairs, from the squared norms ‖r‖², ‖Ax‖², ‖Bx‖², ‖x‖²; the
// largest ‖Ax‖/‖x‖, ‖Bx‖/‖x‖ are kept in `norms`. chosen: first the pairs of the window with η > tol and the first
// guard while η > guard_tol, or while η > tol and its θ may yet reach that of the last of the window; then guards, then
// the rest. No guard is needed if guard_tol is infinite. scale: 1/‖r‖ of the chosen, 0 where r = 0, and then refill
// is 1. Report: leading pairs with η <= tol, unconverged ones of the window, the largest η, Σ log(max(η, tol)) of the
// window, whether the guard is still needed, how far its θ may be from λ (‖r‖ ‖x‖; 0 if it is not needed), whether
// anything is not finite.
struct Judge {
  int64_t batch, w, window, p;
  const double* theta;  // (batch, w), stride theta_batch
  int64_t theta_batch;
  const double* squares;  // (batch, w, 4)
  double tol, guard_tol;
  double* norms;           // (batch, 2)
  double* eta;             // (batch, w)
  int64_t* chosen;         // (batch, p)
  double *scale, *refill;  // (batch, p)
  double* report;          // (batch, kReportSize)
};

void ritz_matrix_cpu(const RitzMatrix& args, std::atomic<int64_t>& next);
void orthonormalizer_cpu(const Orthonormalizer& args, std::atomic<int64_t>& next);
void judge_cpu(const Judge& args, std::atomic<int64_t>& next);

// Throw std::runtime_error if the launch fails. `stream` is a cudaStream_t.
void ritz_matrix_cuda(const RitzMatrix& args, void* stream);
void orthonormalizer_cuda(const Orthonormalizer& args, void* stream);
void judge_cuda(const Judge& args, void* stream);

}  // namespace sst
