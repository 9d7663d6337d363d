// Batched dense generalized eigenproblems, for callers in C++; the op is sst_kernels::fused_eigh.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <tuple>

namespace sst {

// (values (…, n) ascending, vectors (…, n, n) as columns, info (…) int32; see kernels/fused_eigh.h) of A v = λ B v for
// A and B (…, n, n) of one shape, float32 or float64, of which the lower triangles are read. The vectors are adjacent:
// transposed, they are rows of a dense tensor. Throws std::invalid_argument, and on CUDA where n exceeds
// fused_eigh_limit.
std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor> fused_eigh(
    const torch::stable::Tensor& a, const torch::stable::Tensor& b);

// The largest n that fused_eigh takes, in the dtype and on the device of `like`.
int64_t fused_eigh_limit(const torch::stable::Tensor& like);

}  // namespace sst
