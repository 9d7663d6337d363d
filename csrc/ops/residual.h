// Residuals of approximate eigenpairs, for the op and the solver's loop.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <tuple>

namespace sst {

// (R, norms): R = AX − θ BX (N, m, n) and, per vector, ‖r‖², ‖Ax‖², ‖Bx‖², ‖x‖² (N, m, 4) float64. AX, BX, X (N, m, n)
// float32 or float64, a vector in each row; θ (N, m) float64. Rows of adjacent elements, otherwise any strides.
std::tuple<torch::stable::Tensor, torch::stable::Tensor> residual(const torch::stable::Tensor& ax,
                                                                  const torch::stable::Tensor& bx,
                                                                  const torch::stable::Tensor& x,
                                                                  const torch::stable::Tensor& theta);

}  // namespace sst
