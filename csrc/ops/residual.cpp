#include "residual.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "checks.h"
#include "kernels/residual.h"
#include "parallel.h"
#ifdef SST_WITH_CUDA
#include "stream.h"
#endif

namespace sst {

namespace {

constexpr const char* op = "_residual";

void check_vectors(const Argument& v, const Argument& x) {
  if (v.tensor.dim() != 3 || !same_sizes(v.tensor, x.tensor, 3)) {
    fail(op, ": ", v.name, " must be ", shape_of(x.tensor), " as X is, got ", shape_of(v.tensor));
  }
  check_dtype(v, x.tensor.scalar_type(), "to match X");
  check_same_device(v, x);
  check_unit_stride(v);
}

void check_theta(const Argument& theta, const Argument& x) {
  if (theta.tensor.dim() != 2 || !same_sizes(theta.tensor, x.tensor, 2)) {
    fail(op, ": theta must be (", x.tensor.size(0), ", ", x.tensor.size(1), ") to match X ", shape_of(x.tensor),
         ", got ", shape_of(theta.tensor));
  }
  check_dtype(theta, ScalarType::Double, "whatever X's dtype");
  check_same_device(theta, x);
}

template <class T>
Vectors<T> vectors(const Tensor& x) {
  return {data<T>(x), x.stride(0), x.stride(1)};
}

template <class T>
void run(const Residual<T>& args, [[maybe_unused]] const Tensor& on) {
#ifdef SST_WITH_CUDA
  if (on.is_cuda()) {
    const torch::stable::accelerator::DeviceGuard guard(on.get_device_index());
    return residual_cuda(args, current_stream(on.get_device_index()));
  }
#endif
  const int64_t rows = args.batch * args.rows;
  parallel(rows, 4 * rows * args.n * static_cast<int64_t>(sizeof(T)), [&](auto& next) { residual_cpu(args, next); });
}

}  // namespace

std::tuple<Tensor, Tensor> residual(const Tensor& ax, const Tensor& bx, const Tensor& x, const Tensor& theta) {
  const Argument arg_x{op, "X", x};
  if (x.dim() != 3) fail(op, ": X must be (N, m, n), got ", shape_of(x));
  check_wide(arg_x);
  check_unit_stride(arg_x);
  check_vectors({op, "AX", ax}, arg_x);
  check_vectors({op, "BX", bx}, arg_x);
  check_theta({op, "theta", theta}, arg_x);
  const int64_t batch = x.size(0), rows = x.size(1), n = x.size(2);
  const Tensor r = torch::stable::new_empty(x, {batch, rows, n}, x.scalar_type());
  const Tensor norms = torch::stable::new_empty(x, {batch, rows, kResidualNorms}, ScalarType::Double);
  visit_wide(x.scalar_type(), [&]<class T>() {
    run(Residual<T>{vectors<T>(ax), vectors<T>(bx), vectors<T>(x), vectors<double>(theta), mutable_data<T>(r),
                    mutable_data<double>(norms), batch, rows, n},
        x);
  });
  return {r, norms};
}

}  // namespace sst

STABLE_TORCH_LIBRARY_FRAGMENT(sst_kernels, m) {
  m.def("_residual(Tensor AX, Tensor BX, Tensor X, Tensor theta) -> (Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(sst_kernels, CPU, m) { m.impl("_residual", TORCH_BOX(&sst::residual)); }
#ifdef SST_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(sst_kernels, CUDA, m) { m.impl("_residual", TORCH_BOX(&sst::residual)); }
#endif
