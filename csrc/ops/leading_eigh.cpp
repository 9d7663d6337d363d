#include "kernels/leading_eigh.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <initializer_list>
#include <tuple>
#include <vector>

#include "kernels/panel.h"
#include "matrices.h"
#include "parallel.h"

namespace sst {

namespace {

constexpr const char* kOp = "_leading_eigh";

// Status of a pencil that is solved: CONVERGED | VERIFIED of sst_kernels/result.py.
constexpr int64_t kSolved = 1 | 2;

// (values, vectors, errors, orthogonality, status) of leading_eigh.h.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> leading_eigh(const Tensor& a, const Tensor& b, int64_t k,
                                                                double tol) {
  check_wide({kOp, "A", a});
  check_dtype({kOp, "B", b}, a.scalar_type(), "as A");
  if (a.dim() < 2 || a.dim() != b.dim() || a.size(-1) != a.size(-2) || !same_sizes(a, b, a.dim())) {
    fail(kOp, ": A and B must both be (…, n, n), got ", shape_of(a), " and ", shape_of(b));
  }
  const int64_t n = a.size(-1);
  if (k < 1 || k > n) fail(kOp, ": k must be in 1..n with n = ", n, ", got ", k);
  std::vector<int64_t> sizes;
  int64_t batch = 1;
  for (int64_t i = 0; i < a.dim() - 2; ++i) sizes.push_back(a.size(i)), batch *= a.size(i);
  const auto empty = [&](std::initializer_list<int64_t> more, ScalarType dtype) {
    std::vector<int64_t> shape = sizes;
    shape.insert(shape.end(), more);
    return torch::stable::new_empty(a, shape, dtype);
  };
  const ScalarType dtype = a.scalar_type();
  const Tensor values = empty({std::min(k + 1, n)}, dtype), vectors = empty({n, k}, dtype), errors = empty({k}, dtype);
  const Tensor orthogonality = empty({}, dtype), status = empty({}, ScalarType::Long);
  if (batch == 0) return {values, vectors, errors, orthogonality, status};
  visit_wide(dtype, [&]<class T>() {
    // A view where the strides allow it, else a copy.
    const Tensor flat_a = torch::stable::reshape(a, {batch, n, n}), flat_b = torch::stable::reshape(b, {batch, n, n});
    const LeadingEigh<T> args{matrices<T>(flat_a),
                              matrices<T>(flat_b),
                              mutable_data<T>(values),
                              mutable_data<T>(vectors),
                              mutable_data<T>(errors),
                              mutable_data<T>(orthogonality),
                              mutable_data<int64_t>(status),
                              batch,
                              n,
                              k,
                              tol};
    const int set = instruction_set_in_use();
    parallel(batch, 4 * n * n * n * batch, [&](auto& next) { leading_eigh_cpu(set, args, next); });
    for (int64_t i = 0; i < batch; ++i) args.sound[i] *= kSolved;
  });
  return {values, vectors, errors, orthogonality, status};
}

}  // namespace

}  // namespace sst

STABLE_TORCH_LIBRARY_FRAGMENT(sst_kernels, m) {
  m.def("_leading_eigh(Tensor A, Tensor B, int k, float tol) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(sst_kernels, CPU, m) { m.impl("_leading_eigh", TORCH_BOX(&sst::leading_eigh)); }
