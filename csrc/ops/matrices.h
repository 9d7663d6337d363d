// Batches of matrices as the dense eigensolvers read them.
#pragma once

#include "checks.h"
#include "kernels/fused_eigh.h"

namespace sst {

// Of a tensor (batch, n, n), whatever its strides.
template <class T>
Matrices<T> matrices(const Tensor& x) {
  return {data<T>(x), x.stride(0), x.stride(1), x.stride(2)};
}

}  // namespace sst
