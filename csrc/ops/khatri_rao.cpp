#include "kernels/khatri_rao.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "checks.h"
#include "parallel.h"
#ifdef SST_WITH_CUDA
#include "stream.h"
#endif

namespace sst {

namespace {

constexpr const char* kOp = "khatri_rao_rows";

void check_arguments(const Tensor& a, const Tensor& b, const Tensor& offsets,
                     const std::optional<Tensor>& weight) {
  const Argument arg_a{kOp, "a", a}, arg_b{kOp, "b", b}, arg_o{kOp, "cu_seqlens", offsets};
  if (a.dim() != 2) fail(kOp, ": a must be (T, r_a), got ", shape_of(a));
  if (b.dim() != 2 || b.size(0) != a.size(0)) {
    fail(kOp, ": b must be (T, r_b) with T = ", a.size(0), " to match a ", shape_of(a), ", got ",
         shape_of(b));
  }
  check_floating(arg_a);
  check_dtype(arg_b, a.scalar_type(), "to match a");
  check_same_device(arg_b, arg_a);
  check_same_device(arg_o, arg_a);
  check_unit_stride(arg_a);
  check_unit_stride(arg_b);
  if (offsets.dim() != 1 || offsets.size(0) < 1) {
    fail(kOp, ": cu_seqlens must be (S + 1,), the S sequences' boundaries, got ",
         shape_of(offsets));
  }
  if (offsets.scalar_type() != ScalarType::Int) {
    check_dtype(arg_o, ScalarType::Long, "or int32");
  }
  check_unit_stride(arg_o);
  if (weight) {
    const Argument arg_w{kOp, "weight", *weight};
    if (weight->dim() != 1 || weight->size(0) != a.size(0)) {
      fail(kOp, ": weight must be (T,) = (", a.size(0), ",) to match a ", shape_of(a), ", got ",
           shape_of(*weight));
    }
    check_dtype(arg_w, accumulator_dtype(a.scalar_type()), "for data of a's dtype");
    check_same_device(arg_w, arg_a);
    check_unit_stride(arg_w);
  }
}

template <class T>
Rows<T> rows(const Tensor& x) {
  return {data<T>(x), x.stride(0), x.size(1)};
}

template <class T>
void run(const KhatriRao<T>& args, [[maybe_unused]] const Tensor& on) {
#ifdef SST_WITH_CUDA
  if (on.is_cuda()) {
    const torch::stable::accelerator::DeviceGuard guard(on.get_device_index());
    return khatri_rao_rows_cuda(args, current_stream(on.get_device_index()));
  }
#endif
  const int64_t flops = 2 * args.tokens * args.a.cols * args.b.cols;
  parallel(args.sequences, flops, [&](Range range) { khatri_rao_rows_cpu(args, range); });
}

Tensor khatri_rao_rows(const Tensor& a, const Tensor& b, const Tensor& cu_seqlens,
                       const std::optional<Tensor>& weight) {
  check_arguments(a, b, cu_seqlens, weight);
  const int64_t sequences = cu_seqlens.size(0) - 1;
  Tensor out = torch::stable::new_empty(a, {sequences, b.size(1) * a.size(1)},
                                        accumulator_dtype(a.scalar_type()));
  const Offsets offsets{cu_seqlens.const_data_ptr(), cu_seqlens.scalar_type() == ScalarType::Long};
  visit_floating(a.scalar_type(), [&]<class T>() {
    using A = Accumulator<T>;
    const A* w = weight ? data<A>(*weight) : nullptr;
    run(KhatriRao<T>{rows<T>(a), rows<T>(b), w, offsets, a.size(0), sequences,
                     mutable_data<A>(out)},
        a);
  });
  return out;
}

}  // namespace

}  // namespace sst

STABLE_TORCH_LIBRARY_FRAGMENT(sst_kernels, m) {
  m.def("khatri_rao_rows(Tensor a, Tensor b, Tensor cu_seqlens, Tensor? weight=None) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(sst_kernels, CPU, m) {
  m.impl("khatri_rao_rows", TORCH_BOX(&sst::khatri_rao_rows));
}
#ifdef SST_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(sst_kernels, CUDA, m) {
  m.impl("khatri_rao_rows", TORCH_BOX(&sst::khatri_rao_rows));
}
#endif
