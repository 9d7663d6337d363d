// The preconditioners of dense pencils: K⁻¹ = L⁻ᵀL⁻¹ in float32 where that will do, K = B or ηB − A.
#pragma once

#include <optional>

#include "operator.h"

namespace sst {

enum class Definiteness : int64_t { positive, indefinite, not_finite };

struct CholeskyInverse {
  OperatorPtr inverse;
  std::optional<Tensor> factor;            // L (N, n, n), float64, where float32 will not do
  std::vector<Definiteness> definiteness;  // of each pencil; where there is no factor, I stands in its place
};

// From the lower triangles of B (N, n, n). If a B has no factor in float32, or hardly one, all are factored in float64
// before any is called indefinite. n³/3 flops a pencil; n² entries, of which the inverse keeps half on the CPU.
CholeskyInverse cholesky_inverse(const Tensor& b);

// The lower triangle of C = L⁻¹AL⁻ᵀ, of the standard problem C y = θ y with y = Lᵀx, from that of A (N, n, n), in the
// factor's dtype. 2n³ flops a pencil, and four n² matrices.
Tensor congruence(const Tensor& a, const Tensor& factor);
// The rows x = L⁻ᵀy.
Tensor solve_adjoint(const Tensor& factor, const Tensor& y);

// K⁻¹ of K = ηB − A, positive definite for η (N, 1, 1) above λ₁; pencils without a factor keep that of `old`. `old`
// itself if it is not of this kind. n³/3 flops a pencil.
OperatorPtr shifted_inverse(const Tensor& a, const Tensor& b, const Tensor& eta, const OperatorPtr& old);

}  // namespace sst
