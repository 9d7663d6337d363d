// Products of symmetric matrices with thin blocks, for the ops and the solver's loop.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <tuple>

namespace sst {

// Y = A X, A (…, n, n) of which the lower triangle is read, X (…, n, m) row-major or column-major, float32 or float64;
// A may be (n, n) for all of a batch. Y has X's order and is dense.
torch::stable::Tensor symm_thin(const torch::stable::Tensor& a, const torch::stable::Tensor& x);
// (A X, B X).
std::tuple<torch::stable::Tensor, torch::stable::Tensor> symm_thin_pair(const torch::stable::Tensor& a,
                                                                        const torch::stable::Tensor& b,
                                                                        const torch::stable::Tensor& x);

}  // namespace sst
