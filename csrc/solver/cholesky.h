// The preconditioners of dense pencils: K⁻¹ = L⁻ᵀL⁻¹ in float32, K = B or ηB − A.
#pragma once

#include "operator.h"

namespace sst {

enum class Definiteness : int64_t { positive, indefinite, not_finite };

struct CholeskyInverse {
  OperatorPtr inverse;                     // null if no pencil of the batch has one
  std::vector<Definiteness> definiteness;  // of each pencil; where there is no factor, I stands in its place
};

// From the lower triangles of B (N, n, n). A pencil whose B has no factor in float32, or hardly one, is factored in
// float64 before it is called indefinite. n³/3 flops and n² entries of float32 a pencil.
CholeskyInverse cholesky_inverse(const Tensor& b);

// K⁻¹ of K = ηB − A, positive definite for η (N, 1, 1) above λ₁; pencils without a factor keep that of `old`. `old`
// itself if it is not of this kind. n³/3 flops a pencil.
OperatorPtr shifted_inverse(const Tensor& a, const Tensor& b, const Tensor& eta, const OperatorPtr& old);

}  // namespace sst
