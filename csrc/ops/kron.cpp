#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <string>

#include "kernels/counts.h"
#include "products.h"
#ifdef SST_WITH_CUDA
#include "stream.h"
#endif

namespace sst {

namespace {

constexpr const char* kOp = "kron_accumulate_";

// x (…, d) as (T, d): all leading dimensions are tokens.
Tensor as_tokens(const Argument& x) {
  if (x.tensor.dim() < 2) fail(kOp, ": ", x.name, " must be (…, T, d), got ", shape_of(x.tensor));
  return torch::stable::view(x.tensor, {flatten_batch(x, 1).count, x.tensor.size(-1)});
}

void check_delta(const Argument& delta, const Argument& x) {
  const Tensor &d = delta.tensor, &t = x.tensor;
  bool same = d.dim() == t.dim();
  for (int64_t i = 0; same && i + 1 < d.dim(); ++i) same = d.size(i) == t.size(i);
  if (!same) {
    fail(kOp, ": delta must have x's leading dimensions, the tokens, to match x ", shape_of(t), ", got ", shape_of(d));
  }
}

void check_counts(const Argument& counts, const Argument& x) {
  if (counts.tensor.dim() != 1 || counts.tensor.size(0) != 2) {
    fail(kOp, ": counts must be (2,), got ", shape_of(counts.tensor),
         "; allocate it with torch.zeros(2, dtype=torch.float64)");
  }
  check_dtype(counts, ScalarType::Double, "whatever x's dtype");
  check_same_device(counts, x);
  check_unit_stride(counts);
}

// The mask as weights (T,) of the accumulator dtype; booleans are copied.
Tensor as_weight(const Argument& mask, const Argument& x) {
  const Tensor &m = mask.tensor, &t = x.tensor;
  bool same = m.dim() == t.dim() - 1;
  for (int64_t i = 0; same && i < m.dim(); ++i) same = m.size(i) == t.size(i);
  if (!same) fail(kOp, ": mask must have x's leading dimensions, to match x ", shape_of(t), ", got ", shape_of(m));
  const ScalarType dtype = accumulator_dtype(t.scalar_type());
  check_same_device(mask, x);
  if (m.scalar_type() != ScalarType::Bool) check_dtype(mask, dtype, "or bool");
  Tensor weight = m;
  if (m.scalar_type() == ScalarType::Bool || !m.is_contiguous()) {
    weight = torch::stable::new_empty(m, {m.sizes().begin(), m.sizes().end()}, dtype);
    torch::stable::copy_(weight, m);
  }
  return torch::stable::view(weight, {weight.numel()});
}

template <class A>
void add_counts(const Tensor& counts, const std::optional<Tensor>& weight, int64_t tokens, double beta) {
  const Counts<A> args{mutable_data<double>(counts), weight ? data<A>(*weight) : nullptr, tokens, beta};
#ifdef SST_WITH_CUDA
  if (counts.is_cuda()) {
    const torch::stable::accelerator::DeviceGuard guard(counts.get_device_index());
    return add_counts_cuda(args, current_stream(counts.get_device_index()));
  }
#endif
  add_counts_cpu(args);
}

void kron_accumulate_(const Tensor& input_factor, const Tensor& grad_factor, const Tensor& counts, const Tensor& x,
                      const Tensor& delta, const std::optional<Tensor>& mask, double alpha, double beta,
                      bool shared_input, const std::string& precision, [[maybe_unused]] bool deterministic) {
  const Argument arg_x{kOp, "x", x}, arg_delta{kOp, "delta", delta}, arg_counts{kOp, "counts", counts};
  const Tensor x_tokens = as_tokens(arg_x), delta_tokens = as_tokens(arg_delta);
  check_delta(arg_delta, arg_x);
  check_floating(arg_x);
  check_dtype(arg_delta, x.scalar_type(), "to match x");
  check_same_device(arg_delta, arg_x);
  check_counts(arg_counts, arg_x);
  std::optional<Tensor> weight;
  std::optional<Argument> arg_weight;
  if (mask) {
    weight = as_weight({kOp, "mask", *mask}, arg_x);
    arg_weight.emplace(Argument{kOp, "mask", *weight});
  }
  const Product input{{kOp, "input_factor", input_factor}, {kOp, "x", x_tokens}, arg_weight, 1.0, beta};
  const Product grad{{kOp, "grad_factor", grad_factor}, {kOp, "delta", delta_tokens}, arg_weight, alpha, beta};
  std::vector<Argument> read{arg_x, arg_delta};
  if (arg_weight) read.push_back(*arg_weight);
  check_apart({input.s, grad.s, arg_counts}, read);
  const Precision allowed = parse_precision(kOp, precision);
  if (shared_input) {
    check_product(input);
    accumulate_products({grad}, allowed);
  } else {
    accumulate_products({input, grad}, allowed);
  }
  visit_floating(x.scalar_type(),
                 [&]<class T>() { add_counts<Accumulator<T>>(counts, weight, x_tokens.size(0), beta); });
}

}  // namespace

}  // namespace sst

STABLE_TORCH_LIBRARY_FRAGMENT(sst_kernels, m) {
  m.def(
      "kron_accumulate_(Tensor(a!) input_factor, Tensor(b!) grad_factor, Tensor(c!) counts, Tensor x, Tensor delta, "
      "Tensor? mask=None, float alpha=1.0, float beta=1.0, *, bool shared_input=False, str precision=\"ieee\", "
      "bool deterministic=True) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(sst_kernels, CPU, m) { m.impl("kron_accumulate_", TORCH_BOX(&sst::kron_accumulate_)); }
#ifdef SST_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(sst_kernels, CUDA, m) { m.impl("kron_accumulate_", TORCH_BOX(&sst::kron_accumulate_)); }
#endif
