// The correction equation of Jacobi–Davidson, solved inexactly for a block of vectors of each pencil.
#pragma once

#include "operator.h"

namespace sst {

// For each row r of `residual` (N, p, n) with its shift θ (N, p, 1), steps of the preconditioned conjugate gradient
// method on
//     (I − BQQᵀ) (θB − A) (I − QQᵀB) t = r,  QᵀBt = 0,
// positive definite there once Q (N, q, n), B-orthonormal, holds the pairs above θ. The preconditioner is K⁻¹
// projected: g ↦ K⁻¹g − Z (QᵀBZ)⁻¹ QᵀBK⁻¹g with Z = K⁻¹BQ. A row stops when its residual has fallen tenfold, or at a
// direction of no positive curvature; without any step it gets the projected K⁻¹r (Olsen 1990). Each of the steps, one
// or more, applies A, B and K⁻¹ to p rows; K⁻¹ is applied to q rows first.
Tensor solve_correction(const Pencil& pencil, const Tensor& q, const Tensor& bq, const Tensor& theta,
                        const Tensor& residual, int64_t steps);

}  // namespace sst
