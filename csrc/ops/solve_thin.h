// Solves with packed Cholesky factors, on the CPU; see kernels/solve_thin.h.
#pragma once

#include <torch/csrc/stable/tensor.h>

namespace sst {

using torch::stable::Tensor;

// The factors L (N, n, n), of which the lower triangles are read, as (N, packed_factor_size(n)). A pass over them.
Tensor pack_factors(const Tensor& factors);

// The rows L⁻ᵀL⁻¹x of X (N, m, n), contiguous, in the factors' dtype.
Tensor solve_thin(const Tensor& packed, const Tensor& x);

}  // namespace sst
