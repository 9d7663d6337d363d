#include "fused_eigh.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "aten/aten.h"
#include "kernels/panel.h"
#include "matrices.h"
#include "parallel.h"
#ifdef SST_WITH_CUDA
#include "stream.h"
#endif

namespace sst {

namespace {

constexpr const char* kOp = "fused_eigh";

void check_pencils(const Argument& a, const Argument& b) {
  for (const Argument* x : {&a, &b}) {
    const Tensor& t = x->tensor;
    if (t.dim() < 2 || t.size(-1) != t.size(-2)) fail(kOp, ": ", x->name, " must be (…, n, n), got ", shape_of(t));
    check_wide(*x);
  }
  check_dtype(b, a.tensor.scalar_type(), "as A");
  check_same_device(b, a);
  if (a.tensor.dim() != b.tensor.dim() || !same_sizes(a.tensor, b.tensor, a.tensor.dim())) {
    fail(kOp, ": A and B must have one shape, got ", shape_of(a.tensor), " and ", shape_of(b.tensor),
         "; broadcast them with .expand()");
  }
}

// The same pencil by LAPACK, through ATen: its steps are those of the kernel.
template <class T>
struct ByLapack {
  const FusedEigh<T>& args;
  const Tensor& like;

  // The member's matrix, both triangles; false if it is not finite.
  bool read(const Matrices<T>& from, int64_t member, const Tensor& to) const {
    const T* const x = from.data + member * from.batch;
    T* const out = mutable_data<T>(to);
    T sum = 0;
    for (int64_t i = 0; i < args.n; ++i) {
      for (int64_t j = 0; j <= i; ++j) {
        const T value = x[i * from.row + j * from.col];
        out[i * args.n + j] = out[j * args.n + i] = value;
        sum += value - value;
      }
    }
    return sum == 0;
  }

  int32_t solve(int64_t member) const {
    using aten::solve_triangular, aten::transposed, torch::stable::contiguous;
    const int64_t n = args.n;
    const Tensor a = torch::stable::new_empty(like, {n, n}), b = torch::stable::new_empty(like, {n, n});
    if (!read(args.a, member, a) || !read(args.b, member, b)) return kFusedNotFinite;
    const auto [l, info] = aten::cholesky_ex(b);
    if (*data<int32_t>(info) != 0) return kFusedIndefinite;
    const Tensor lt = transposed(l);
    const Tensor c = contiguous(solve_triangular(l, solve_triangular(lt, a, true, false), false, true));
    T sum = 0;
    for (int64_t i = 0; i < n * n; ++i) sum += data<T>(c)[i] - data<T>(c)[i];
    if (sum != 0) return kFusedNotFinite;
    // Not aten::linalg_eigh, which throws where this may fail.
    std::array eigen{torch::stable::detail::from(c), torch::stable::detail::from(std::string("L"))};
    if (torch_call_dispatcher("aten::linalg_eigh", "", eigen.data(), TORCH_ABI_VERSION) != TORCH_SUCCESS) {
      return kFusedNotConverged;
    }
    const Tensor values = aten::take(eigen[0]), y = aten::take(eigen[1]);
    const Tensor v = contiguous(transposed(solve_triangular(lt, y, true, true)));
    T* const out = args.vectors + member * n * n;
    std::copy_n(data<T>(values), n, args.values + member * n);
    std::copy_n(data<T>(v), n * n, out);
    for (int64_t i = 0; i < n * n; ++i) sum += out[i] - out[i];
    return sum == 0 ? kFusedOk : kFusedNotFinite;
  }

  void run(std::atomic<int64_t>& next) const {
    for (int64_t member = next++; member < args.batch; member = next++) {
      args.info[member] = solve(member);
      if (args.info[member] == kFusedOk) continue;
      std::fill_n(args.values + member * args.n, args.n, std::numeric_limits<T>::quiet_NaN());
      std::fill_n(args.vectors + member * args.n * args.n, args.n * args.n, std::numeric_limits<T>::quiet_NaN());
    }
  }
};

template <class T>
void run(const FusedEigh<T>& args, const Tensor& on) {
#ifdef SST_WITH_CUDA
  if (on.is_cuda()) {
    const torch::stable::accelerator::DeviceGuard guard(on.get_device_index());
    const int64_t limit = fused_eigh_limit(on);
    if (args.n > limit) {
      fail(kOp, ": n must be at most ", limit, " for ", dtype_name(on.scalar_type()), " on this device, got ", args.n,
           "; use sst_kernels.eigh, or sst_kernels.solve for the largest pairs");
    }
    return fused_eigh_cuda(args, current_stream(on.get_device_index()));
  }
#endif
  const int set = instruction_set_in_use();
  const int64_t lanes = fused_eigh_lanes(set), groups = (args.batch + lanes - 1) / lanes;
  const int64_t work = 10 * args.n * args.n * args.n * args.batch;
  // A group of eight lanes costs what n / 32 members cost LAPACK (measured).
  if (args.n <= kFusedLanesLimit && 32 * args.batch >= args.n) {
    return parallel(groups, work, [&](auto& next) { fused_eigh_cpu(set, args, next); });
  }
  parallel(args.batch, work, [&](auto& next) { ByLapack<T>{args, on}.run(next); });
}

}  // namespace

int64_t fused_eigh_limit([[maybe_unused]] const Tensor& like) {
  int64_t limit = std::numeric_limits<int64_t>::max();
#ifdef SST_WITH_CUDA
  if (like.is_cuda()) {
    const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
    visit_wide(like.scalar_type(), [&]<class T>() { limit = fused_eigh_cuda_limit<T>(); });
  }
#endif
  return limit;
}

std::tuple<Tensor, Tensor, Tensor> fused_eigh(const Tensor& a, const Tensor& b) {
  check_pencils({kOp, "A", a}, {kOp, "B", b});
  const int64_t n = a.size(-1);
  int64_t batch = 1;
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < a.dim() - 2; ++i) {
    sizes.push_back(a.size(i));
    batch *= a.size(i);
  }
  const Tensor info = torch::stable::new_zeros(a, sizes, ScalarType::Int);
  sizes.push_back(n);
  const Tensor values = torch::stable::new_empty(a, sizes);
  sizes.push_back(n);
  const Tensor rows = torch::stable::new_empty(a, sizes);
  if (rows.numel() > 0) {
    // A view where the strides allow it, else a copy.
    const Tensor flat_a = torch::stable::reshape(a, {batch, n, n}), flat_b = torch::stable::reshape(b, {batch, n, n});
    visit_wide(a.scalar_type(), [&]<class T>() {
      run(FusedEigh<T>{matrices<T>(flat_a), matrices<T>(flat_b), mutable_data<T>(values), mutable_data<T>(rows),
                       mutable_data<int32_t>(info), batch, n},
          a);
    });
  }
  return {values, torch::stable::transpose(rows, -2, -1), info};
}

}  // namespace sst

STABLE_TORCH_LIBRARY_FRAGMENT(sst_kernels, m) {
  m.def("fused_eigh(Tensor A, Tensor B) -> (Tensor values, Tensor vectors, Tensor info)");
  m.def("fused_eigh_limit(Tensor like) -> int");
}
STABLE_TORCH_LIBRARY_IMPL(sst_kernels, CPU, m) {
  m.impl("fused_eigh", TORCH_BOX(&sst::fused_eigh));
  m.impl("fused_eigh_limit", TORCH_BOX(&sst::fused_eigh_limit));
}
#ifdef SST_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(sst_kernels, CUDA, m) {
  m.impl("fused_eigh", TORCH_BOX(&sst::fused_eigh));
  m.impl("fused_eigh_limit", TORCH_BOX(&sst::fused_eigh_limit));
}
#endif
