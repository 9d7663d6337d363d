#include "kernels/khatri_rao.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "parallel.h"
#include "products.h"
#ifdef SST_WITH_CUDA
#include "stream.h"
#endif

namespace sst {

namespace {

// The arguments of both ops.
struct Sequences {
  const char* op;
  const Tensor &a, &b, &offsets;
  const std::optional<Tensor>& weight;

  int64_t count() const { return offsets.size(0) - 1; }
  int64_t n() const { return b.size(1) * a.size(1); }
};

void check_offsets(const Argument& offsets, const Argument& a) {
  if (offsets.tensor.dim() != 1 || offsets.tensor.size(0) < 1) {
    fail(a.op, ": cu_seqlens must be (S + 1,), the S sequences' boundaries, got ", shape_of(offsets.tensor));
  }
  if (offsets.tensor.scalar_type() != ScalarType::Int) check_dtype(offsets, ScalarType::Long, "or int32");
  check_same_device(offsets, a);
  check_unit_stride(offsets);
}

void check_weight(const Argument& weight, const Argument& a) {
  if (weight.tensor.dim() != 1 || weight.tensor.size(0) != a.tensor.size(0)) {
    fail(a.op, ": weight must be (T,) = (", a.tensor.size(0), ",) to match a ", shape_of(a.tensor), ", got ",
         shape_of(weight.tensor));
  }
  check_dtype(weight, accumulator_dtype(a.tensor.scalar_type()), "for data of a's dtype");
  check_same_device(weight, a);
  check_unit_stride(weight);
}

void check_sequences(const Sequences& args) {
  const auto& [op, a, b, offsets, weight] = args;
  const Argument arg_a{op, "a", a}, arg_b{op, "b", b};
  if (a.dim() != 2) fail(op, ": a must be (T, r_a), got ", shape_of(a));
  if (b.dim() != 2 || b.size(0) != a.size(0)) {
    fail(op, ": b must be (T, r_b) with T = ", a.size(0), " to match a ", shape_of(a), ", got ", shape_of(b));
  }
  check_floating(arg_a);
  check_dtype(arg_b, a.scalar_type(), "to match a");
  check_same_device(arg_b, arg_a);
  check_unit_stride(arg_a);
  check_unit_stride(arg_b);
  check_offsets({op, "cu_seqlens", offsets}, arg_a);
  if (weight) check_weight({op, "weight", *weight}, arg_a);
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
  parallel(args.sequences, flops, [&](auto& next) { khatri_rao_rows_cpu(args, next); });
}

// Sequences [first, first + count) into the rows of `out`.
void write_rows(const Sequences& args, int64_t first, int64_t count, const Tensor& out) {
  const bool is_int64 = args.offsets.scalar_type() == ScalarType::Long;
  const char* const boundaries = static_cast<const char*>(args.offsets.const_data_ptr());
  const Offsets offsets{boundaries + first * (is_int64 ? sizeof(int64_t) : sizeof(int32_t)), is_int64};
  visit_floating(args.a.scalar_type(), [&]<class T>() {
    using A = Accumulator<T>;
    const A* const weight = args.weight ? data<A>(*args.weight) : nullptr;
    run(KhatriRao<T>{rows<T>(args.a), rows<T>(args.b), weight, offsets, args.a.size(0), count, mutable_data<A>(out)},
        args.a);
  });
}

Tensor new_rows(const Sequences& args, int64_t count) {
  return torch::stable::new_empty(args.a, {count, args.n()}, accumulator_dtype(args.a.scalar_type()));
}

Tensor khatri_rao_rows(const Tensor& a, const Tensor& b, const Tensor& cu_seqlens,
                       const std::optional<Tensor>& weight) {
  const Sequences args{"khatri_rao_rows", a, b, cu_seqlens, weight};
  check_sequences(args);
  const Tensor out = new_rows(args, args.count());
  write_rows(args, 0, args.count(), out);
  return out;
}

// The rows g exist only a chunk at a time, small enough for a cache to hold, large enough that F is read and written
// seldom: 4 MiB of rows, but at least 256 of them.
void khatri_rao_syrk_accumulate_(const Tensor& f, const Tensor& a, const Tensor& b, const Tensor& cu_seqlens,
                                 const std::optional<Tensor>& weight, double alpha, double beta,
                                 const std::string& precision, [[maybe_unused]] bool deterministic) {
  constexpr const char* op = "khatri_rao_syrk_accumulate_";
  const Sequences args{op, a, b, cu_seqlens, weight};
  check_sequences(args);
  const Precision allowed = parse_precision(op, precision);
  const Argument arg_f{op, "F", f};
  std::vector<Argument> read{{op, "a", a}, {op, "b", b}, {op, "cu_seqlens", cu_seqlens}};
  if (weight) read.push_back({op, "weight", *weight});
  check_apart({arg_f}, read);
  const int64_t most = std::max<int64_t>(256, (1 << 20) / std::max<int64_t>(args.n(), 1));
  const Tensor chunk = new_rows(args, std::min(most, args.count()));
  int64_t first = 0;
  do {  // once for no sequences too, which scales F
    const int64_t count = std::min(most, args.count() - first);
    const Tensor g = torch::stable::narrow(const_cast<Tensor&>(chunk), 0, 0, count);
    const Product product{arg_f, {op, "g", g}, std::nullopt, alpha, first == 0 ? beta : 1.0};
    if (first == 0) check_product(product);
    write_rows(args, first, count, g);
    accumulate_products({product}, allowed);
    first += count;
  } while (first < args.count());
}

}  // namespace

}  // namespace sst

STABLE_TORCH_LIBRARY_FRAGMENT(sst_kernels, m) {
  m.def("khatri_rao_rows(Tensor a, Tensor b, Tensor cu_seqlens, Tensor? weight=None) -> Tensor");
  m.def(
      "khatri_rao_syrk_accumulate_(Tensor(a!) F, Tensor a, Tensor b, Tensor cu_seqlens, Tensor? weight=None, "
      "float alpha=1.0, float beta=1.0, *, str precision=\"ieee\", bool deterministic=True) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(sst_kernels, CPU, m) {
  m.impl("khatri_rao_rows", TORCH_BOX(&sst::khatri_rao_rows));
  m.impl("khatri_rao_syrk_accumulate_", TORCH_BOX(&sst::khatri_rao_syrk_accumulate_));
}
#ifdef SST_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(sst_kernels, CUDA, m) {
  m.impl("khatri_rao_rows", TORCH_BOX(&sst::khatri_rao_rows));
  m.impl("khatri_rao_syrk_accumulate_", TORCH_BOX(&sst::khatri_rao_syrk_accumulate_));
}
#endif
