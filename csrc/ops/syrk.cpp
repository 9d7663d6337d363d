#include "kernels/syrk.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <string>

#include "checks.h"
#include "parallel.h"
#ifdef SST_WITH_CUDA
#include "stream.h"
#endif

namespace sst {

namespace {

constexpr const char* kOp = "syrk_accumulate_";

// The leading dimensions of two tensors are equal, those beyond the last `s_trailing` and
// `x_trailing`.
bool same_batch(const Tensor& s, int64_t s_trailing, const Tensor& x, int64_t x_trailing) {
  if (s.dim() - s_trailing != x.dim() - x_trailing) return false;
  for (int64_t i = 0; i < s.dim() - s_trailing; ++i) {
    if (s.size(i) != x.size(i)) return false;
  }
  return true;
}

void check_x(const Argument& x) {
  if (x.tensor.dim() < 2) fail(kOp, ": X must be (…, T, d), got ", shape_of(x.tensor));
  check_floating(x);
  check_unit_stride(x);
}

void check_s(const Argument& s, const Argument& x) {
  const int64_t d = x.tensor.size(-1), dim = s.tensor.dim();
  if (dim < 2 || s.tensor.size(dim - 1) != d || s.tensor.size(dim - 2) != d ||
      !same_batch(s.tensor, 2, x.tensor, 2)) {
    const char* lead = x.tensor.dim() > 2 ? "…, " : "";
    fail(kOp, ": S must be (", lead, "d, d) = (", lead, d, ", ", d, ") to match X ",
         shape_of(x.tensor), ", got ", shape_of(s.tensor), "; allocate it with X's leading ",
         "dimensions, as X.new_zeros(*X.shape[:-2], d, d, dtype=torch.",
         dtype_name(accumulator_dtype(x.tensor.scalar_type())), ") does");
  }
  check_dtype(s, accumulator_dtype(x.tensor.scalar_type()), "for data of X's dtype");
  check_same_device(s, x);
  check_unit_stride(s);
  check_no_self_overlap(s);
  check_apart(s, x);
}

void check_weight(const Argument& weight, const Argument& x, const Argument& s) {
  const Tensor& w = weight.tensor;
  if (w.dim() < 1 || w.size(-1) != x.tensor.size(-2) || !same_batch(w, 1, x.tensor, 2)) {
    fail(kOp, ": weight must be (…, T), X's shape without its last dimension, to match X ",
         shape_of(x.tensor), ", got ", shape_of(w));
  }
  check_dtype(weight, accumulator_dtype(x.tensor.scalar_type()), "for data of X's dtype");
  check_same_device(weight, x);
  check_unit_stride(weight);
  check_apart(s, weight);
}

// The kernels compute in float32 whatever is asked for, which is at least as precise.
void check_precision(const std::string& precision) {
  if (precision != "ieee" && precision != "tf32" && precision != "bf16x3") {
    fail(kOp, ": precision must be 'ieee', 'tf32' or 'bf16x3', got '", precision, "'");
  }
}

template <class T>
void run(const Syrk<T>& args, [[maybe_unused]] const Tensor& on) {
#ifdef SST_WITH_CUDA
  if (on.is_cuda()) {
    const torch::stable::accelerator::DeviceGuard guard(on.get_device_index());
    return syrk_accumulate_cuda(args, current_stream(on.get_device_index()));
  }
#endif
  const int64_t flops = args.batch * args.tokens * args.x.cols * (args.x.cols + 1);
  parallel(syrk_blocks_cpu(args), flops, [&](Range range) { syrk_accumulate_cpu(args, range); });
}

void syrk_accumulate_(const Tensor& s, const Tensor& x, const std::optional<Tensor>& weight,
                      double alpha, double beta, const std::string& precision,
                      [[maybe_unused]] bool deterministic) {
  const Argument arg_s{kOp, "S", s}, arg_x{kOp, "X", x};
  check_x(arg_x);
  check_s(arg_s, arg_x);
  if (weight) check_weight({kOp, "weight", *weight}, arg_x, arg_s);
  check_precision(precision);
  const Batch s_batch = flatten_batch(arg_s, 2), x_batch = flatten_batch(arg_x, 2);
  const Batch w_batch = weight ? flatten_batch({kOp, "weight", *weight}, 1) : Batch{1, 0};
  visit_floating(x.scalar_type(), [&]<class T>() {
    using A = Accumulator<T>;
    run(Syrk<T>{.s = mutable_data<A>(s),
                .s_batch_stride = s_batch.stride,
                .s_row_stride = s.stride(-2),
                .x = {data<T>(x), x.stride(-2), x.size(-1)},
                .x_batch_stride = x_batch.stride,
                .weight = weight ? data<A>(*weight) : nullptr,
                .weight_batch_stride = w_batch.stride,
                .batch = x_batch.count,
                .tokens = x.size(-2),
                .alpha = static_cast<A>(alpha),
                .beta = static_cast<A>(beta)},
        x);
  });
}

}  // namespace

}  // namespace sst

STABLE_TORCH_LIBRARY_FRAGMENT(sst_kernels, m) {
  m.def(
      "syrk_accumulate_(Tensor(a!) S, Tensor X, Tensor? weight=None, float alpha=1.0, "
      "float beta=1.0, *, str precision=\"ieee\", bool deterministic=True) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(sst_kernels, CPU, m) {
  m.impl("syrk_accumulate_", TORCH_BOX(&sst::syrk_accumulate_));
}
#ifdef SST_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(sst_kernels, CUDA, m) {
  m.impl("syrk_accumulate_", TORCH_BOX(&sst::syrk_accumulate_));
}
#endif
