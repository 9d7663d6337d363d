// The small dense steps (kernels/ritz.h) on tensors of the CPU or a CUDA device.
#pragma once

#include "aten/aten.h"
#include "kernels/ritz.h"

namespace sst {

using torch::stable::Tensor;

struct SmallEigen {
  Tensor theta;   // (N, m) float64, descending
  Tensor rows;    // (N, m, m) float64: row i holds the coefficients of Ritz vector i
  Tensor matrix;  // (N, m, m) float64: H
  Tensor valid;   // (N, m) float64: 1 for a vector, 0 for none; those come last
};
// Eigenpairs of H (N, m, m), of which the lower triangle is read; rows that are no vector (valid (N, m) = 0) come last.
// Where H is not finite, those of I.
SmallEigen ritz_pairs(const Tensor& h, const Tensor& valid);

struct Orthonormal {
  Tensor of_basis, of_block;  // (N, p, m), (N, p, p) float64: T' = of_basis S + of_block T
  Tensor valid;               // (N, p) float64
};
// Coefficients that make T B-orthonormal to itself and to S, from C = S (BT)ᵀ (N, m, p) and G = T (BT)ᵀ (N, p, p).
// `magnitude` (N, p), ‖t‖² ‖Bt‖², may be null; `notes` (N, 2): see kernels/ritz.h.
Orthonormal orthonormalizer(const Tensor& c, const Tensor& g, const Tensor* magnitude, double drop, double rounding,
                            Tensor notes);

struct Judgement {
  Tensor eta;            // (N, w) float64
  Tensor chosen;         // (N, p) int64
  Tensor scale, refill;  // (N, p) float64
  Tensor report;         // (N, kReportSize) float64
};
// See kernels/ritz.h; `norms` (N, 2), running estimates of ‖A‖ and ‖B‖, grow.
Judgement judge(const Tensor& theta, const Tensor& squares, int64_t window, int64_t p, double tol, double guard_tol,
                Tensor norms);

}  // namespace sst
