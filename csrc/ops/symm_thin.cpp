#include "symm_thin.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "checks.h"
#include "kernels/symm_thin.h"
#include "parallel.h"
#ifdef SST_WITH_CUDA
#include "stream.h"
#endif

namespace sst {

namespace {

bool same_leading(const Tensor& a, const Tensor& x) {
  return a.dim() == 2 || (a.dim() == x.dim() && same_sizes(a, x, x.dim() - 2));
}

void check_block(const Argument& x) {
  if (x.tensor.dim() < 2) fail(x.op, ": X must be (…, n, m), got ", shape_of(x.tensor));
  check_wide(x);
}

// Returns the strides of A's batch.
Batch check_matrix(const Argument& a, const Argument& x) {
  const Tensor &t = a.tensor, &block = x.tensor;
  const int64_t n = block.size(-2);
  if (t.dim() < 2 || t.size(-1) != n || t.size(-2) != n || !same_leading(t, block)) {
    fail(a.op, ": ", a.name, " must be (…, n, n) with n = ", n, " to match X ", shape_of(block),
         ", its leading dimensions X's or none, got ", shape_of(t));
  }
  check_dtype(a, block.scalar_type(), "to match X");
  check_same_device(a, x);
  check_unit_stride(a);
  return t.dim() == 2 ? Batch{1, 0} : flatten_batch(a, 2);
}

// In X's order, dense.
Tensor new_like(const Tensor& x) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < x.dim(); ++i) sizes.push_back(x.size(i));
  const bool columns = x.stride(-2) == 1 && x.stride(-1) != 1;
  if (columns) std::swap(sizes[x.dim() - 1], sizes[x.dim() - 2]);
  const Tensor y = torch::stable::new_empty(x, sizes, x.scalar_type());
  return columns ? torch::stable::transpose(y, -2, -1) : y;
}

template <class T>
void run(const SymmThin<T>& product, const Tensor& on) {
#ifdef SST_WITH_CUDA
  if (on.is_cuda()) {
    const torch::stable::accelerator::DeviceGuard guard(on.get_device_index());
    const Tensor workspace = torch::stable::new_empty(on, {symm_thin_workspace_cuda(product)}, on.scalar_type());
    return symm_thin_cuda(product, mutable_data<T>(workspace), current_stream(on.get_device_index()));
  }
#endif
  SymmThinCpu<T> plan(product, torch::stable::get_num_threads());
  const Tensor workspace = torch::stable::new_empty(on, {plan.workspace()}, on.scalar_type());
  T* const memory = mutable_data<T>(workspace);
  const int64_t flops = 2 * product.matrices * plan.members() * product.n * product.n * product.m;
  for (int64_t first = 0; first < product.members; first += plan.members()) {
    parallel(plan.units(), flops / 16, [&](auto& next) { plan.pack(first, memory, next); });
    parallel(plan.units(), flops, [&](auto& next) { plan.multiply(first, memory, next); });
  }
}

struct Factor {
  const Argument& matrix;
  const Tensor y;
  Batch batch;
};

template <class T>
void multiply(const std::vector<Factor>& factors, const Tensor& x, Batch batch) {
  SymmThin<T> product{.matrices = static_cast<int64_t>(factors.size()),
                      .a = {},
                      .x = {data<T>(x), batch.stride, x.stride(-2), x.stride(-1)},
                      .y = {},
                      .members = batch.count,
                      .n = x.size(-2),
                      .m = x.size(-1)};
  for (size_t k = 0; k < factors.size(); ++k) {
    const Tensor &a = factors[k].matrix.tensor, &y = factors[k].y;
    product.a[k] = {data<T>(a), factors[k].batch.stride, a.stride(-2), 1};
    product.y[k] = {mutable_data<T>(y), product.n * product.m, y.stride(-2), y.stride(-1)};
  }
  run(product, x);
}

std::vector<Tensor> multiply(const std::vector<Argument>& matrices, const Argument& x) {
  check_block(x);
  std::vector<Factor> factors;
  std::vector<Tensor> out;
  for (const Argument& a : matrices) factors.push_back({a, new_like(x.tensor), check_matrix(a, x)});
  for (const Factor& factor : factors) out.push_back(factor.y);
  if (x.tensor.numel() == 0) return out;
  const Batch batch = flatten_batch(x, 2);
  visit_wide(x.tensor.scalar_type(), [&]<class T>() { multiply<T>(factors, x.tensor, batch); });
  return out;
}

}  // namespace

Tensor symm_thin(const Tensor& a, const Tensor& x) {
  constexpr const char* op = "symm_thin";
  return multiply({{op, "A", a}}, {op, "X", x})[0];
}

std::tuple<Tensor, Tensor> symm_thin_pair(const Tensor& a, const Tensor& b, const Tensor& x) {
  constexpr const char* op = "symm_thin_pair";
  const auto y = multiply({{op, "A", a}, {op, "B", b}}, {op, "X", x});
  return {y[0], y[1]};
}

}  // namespace sst

STABLE_TORCH_LIBRARY_FRAGMENT(sst_kernels, m) {
  m.def("symm_thin(Tensor A, Tensor X) -> Tensor");
  m.def("symm_thin_pair(Tensor A, Tensor B, Tensor X) -> (Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(sst_kernels, CPU, m) {
  m.impl("symm_thin", TORCH_BOX(&sst::symm_thin));
  m.impl("symm_thin_pair", TORCH_BOX(&sst::symm_thin_pair));
}
#ifdef SST_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(sst_kernels, CUDA, m) {
  m.impl("symm_thin", TORCH_BOX(&sst::symm_thin));
  m.impl("symm_thin_pair", TORCH_BOX(&sst::symm_thin_pair));
}
#endif
